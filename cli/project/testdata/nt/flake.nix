{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-[%%nixVersion%%]";
  outputs = { nixpkgs, ... }: {
    nixosConfigurations."[%%nodeName%%]" = nixpkgs.lib.nixosSystem { system = "[%%hwArch%%]"; modules = [ ./configuration.nix ]; };
  };
}
