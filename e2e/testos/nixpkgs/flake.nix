{
  description = "what a NixOS configuration uses of nixpkgs, for nodes that have Nix and systemd but no nixpkgs";

  outputs = { self }:
    let
      lib = import ./lib;
      systems = [ "x86_64-linux" "aarch64-linux" ];
    in
    {
      lib = lib // { nixosSystem = import ./nixos; };
      legacyPackages = lib.genAttrs systems (system: import ./pkgs { inherit lib system; });
    };
}
