# Which packages a configuration sees as `pkgs`.
{ config, lib, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.nixpkgs;
in
{
  options.nixpkgs = {
    system = mkOption { type = types.str; default = cfg.hostPlatform; };
    hostPlatform = mkOption {
      type = types.either types.str types.attrs;
      default = throw "neither nixosSystem's `system` nor nixpkgs.hostPlatform says which system this machine is";
      apply = platform: platform.system or platform;
    };
    config = mkOption { type = types.attrsOf types.anything; default = { }; };
    overlays = mkOption { type = types.listOf types.raw; default = [ ]; };
    pkgs = mkOption { type = types.raw; default = import ../pkgs { inherit lib; inherit (cfg) system overlays config; }; };
  };
  config._module.args = {
    inherit (cfg) pkgs;
    utils.escapeSystemdExecArgs = lib.concatMapStringsSep " " (x: lib.replaceStrings [ "%" "$" ] [ "%%" "$$" ] (builtins.toJSON (toString x)));
  };
}
