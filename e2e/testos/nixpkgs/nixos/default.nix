# lib.nixosSystem: evaluates a configuration over the options below, and renders it to a system of testos. toplevel.nix says
# what becomes of what; loose.nix has the options that are taken and mean nothing here.
{ modules, specialArgs ? { }, system ? null, pkgs ? null, lib ? import ../lib, prefix ? [ ], ... }:
let
  eval = lib.evalModules {
    class = "nixos";
    inherit prefix;
    specialArgs = { modulesPath = toString ./.; } // specialArgs;
    modules = [
      ./assertions.nix
      ./environment.nix
      ./loose.nix
      ./network.nix
      ./nixpkgs.nix
      ./ssh.nix
      ./systemd.nix
      ./toplevel.nix
      ./users.nix
      { _file = "nixosSystem"; nixpkgs = lib.optionalAttrs (system != null) { system = lib.mkDefault system; } // lib.optionalAttrs (pkgs != null) { inherit pkgs; }; }
    ] ++ modules;
  };
in
eval // { inherit lib; inherit (eval._module.args) pkgs; }
