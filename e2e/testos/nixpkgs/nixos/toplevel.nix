# config.system.build.toplevel: the configuration as a system of testos (../testos), which is put beside this folder where
# the stand-in is installed.
{ config, lib, ... }:
let
  inherit (lib) mkOption types;
  inherit (config.nixpkgs) system;
  testos = import ../testos/derivations.nix { inherit system; };

  unit = name: u:
    if u.overrideStrategy == "asDropin"
    then lib.nameValuePair "${name}.d/overrides.conf" { inherit (u) text; wantedBy = [ ]; }
    else lib.nameValuePair name {
      inherit (u) text restartIfChanged reloadIfChanged stopIfChanged;
      wantedBy = u.wantedBy;
      requiredBy = u.requiredBy ++ u.upheldBy;
    };

  # Activation's parts, each after those that it depends on.
  scripts = config.system.activationScripts;
  visit = state: name:
    if lib.elem name state then state
    else lib.foldl' visit state (lib.filter (dep: scripts ? ${dep}) scripts.${name}.deps) ++ [ name ];
  order = lib.foldl' visit [ ] (lib.attrNames scripts);

  failed = map (a: "- ${a.message}") (lib.filter (a: !a.assertion) config.assertions);
  checked = x: if failed != [ ] then throw "\nFailed assertions:\n${lib.concatStringsSep "\n" failed}" else lib.foldr lib.warn x config.warnings;
in
{
  options = {
    system.build = mkOption { type = types.lazyAttrsOf types.raw; default = { }; };
    testos.firewall = mkOption { type = types.lines; default = ""; internal = true; };
  };

  config.system.build.toplevel = checked (import ../testos/system.nix {
    inherit system testos;
    nodeName = config.networking.hostName;
    nixVersion = config.system.nixos.release;
    config = {
      units = lib.mapAttrs' unit (lib.filterAttrs (_: u: u.enable && u.text != null) config.systemd.units);
      etc = lib.mapAttrs' (_: e: lib.nameValuePair e.target { inherit (e) source mode; }) (lib.filterAttrs (_: e: e.enable) config.environment.etc);
      activationScript = lib.concatMapStrings (name: "# ${name}\n${scripts.${name}.text}\n") order;
      buildScript = "";
      packages = config.environment.systemPackages;
      kernel = config.boot.kernelPackages.kernel.version;
      firewall = config.testos.firewall;
    };
  });
}
