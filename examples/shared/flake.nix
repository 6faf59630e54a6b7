# The flake of one node: every node gets its own copy, with its name filled in. flake.lock says which nixpkgs all of them use.
{
  description = "[%%nodeName%%]";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-[%%nixVersion%%]";

  outputs = { nixpkgs, ... }@inputs: {
    nixosConfigurations."[%%nodeName%%]" = nixpkgs.lib.nixosSystem {
      system = "[%%hwArch%%]";
      modules = [
        ./configuration.nix
        { _module.args = { inherit inputs; }; }
      ];
    };
  };
}
