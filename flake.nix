{
  description = "Deploys to fleets of NixOS machines that pull, prove, and roll back by themselves";

  # There is no flake.lock here: whoever uses this flake has their own nixpkgs follow it in. Go 1.26 has to be in it.
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs = { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      linux = [ "x86_64-linux" "aarch64-linux" ];
      darwin = [ "x86_64-darwin" "aarch64-darwin" ];
      version = "0.1.0-${self.shortRev or self.dirtyShortRev or "unknown"}";

      programs = pkgs: names: lib.genAttrs names (program: pkgs.callPackage ./nixos-module/package.nix {
        inherit program version;
      });
      everything = [ "nix-infra" "nix-infra-agent" "nix-infra-controller" ];
      # Nodes run Linux; people run anything.
      programsFor = system: if lib.elem system linux then everything else [ "nix-infra" ];
      forSystems = systems: f: lib.genAttrs systems (system: f nixpkgs.legacyPackages.${system} system);
    in
    {
      packages = forSystems (linux ++ darwin) (pkgs: system:
        let all = programs pkgs (programsFor system); in all // { default = all.nix-infra; });

      overlays.default = final: _: programs final everything;

      nixosModules = {
        default = ./nixos-module;
        agent = ./nixos-module/agent.nix;
        controller = ./nixos-module/controller.nix;
        secrets = ./nixos-module/secrets.nix;
      };

      devShells = forSystems (linux ++ darwin) (pkgs: _: {
        default = pkgs.mkShellNoCC { packages = [ (pkgs.go_1_26 or pkgs.go) pkgs.gnumake pkgs.git ]; };
      });

      checks = forSystems linux (pkgs: _: programs pkgs everything // {
        vm = pkgs.testers.runNixOSTest {
          imports = [ ./nixos-module/test.nix ];
          defaults = {
            imports = [ self.nixosModules.default ];
            nixpkgs.overlays = [ self.overlays.default ];
          };
          node.pkgsReadOnly = false;
        };
      });
    };
}
