{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-[%%nixVersion%%]";
  outputs = { nixpkgs, ... }@inputs: {
    nixosConfigurations."[%%nodeName%%]" = nixpkgs.lib.nixosSystem {
      system = "[%%hwArch%%]";
      modules = [ ./configuration.nix { _module.args = inputs; } ];
    };
  };
}
