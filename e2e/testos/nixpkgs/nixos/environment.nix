# Files in /etc, the system's programs, what activation runs, and systemd-tmpfiles' rules.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  option = type: default: mkOption { inherit type default; };

  file = { name, config, ... }: {
    options = {
      enable = option types.bool true;
      target = option types.str name;
      text = option (types.nullOr types.lines) null;
      source = mkOption { type = types.path; };
      mode = option types.str "symlink";
      user = option types.str "+0";
      group = option types.str "+0";
      uid = option types.int 0;
      gid = option types.int 0;
    };
    config.source = lib.mkIf (config.text != null) (lib.mkDefault (pkgs.writeText "etc-${baseNameOf name}" config.text));
  };

  rule = path: type: r: "${type} '${path}' ${r.mode} ${r.user} ${r.group} ${r.age} ${r.argument}";
  ruleOptions.options = lib.genAttrs [ "mode" "user" "group" "age" ] (_: option types.str "-") // { argument = option types.str ""; };
  tmpfiles = config.systemd.tmpfiles;
  rules = tmpfiles.rules ++ lib.concatLists (lib.mapAttrsToList (_: paths:
    lib.concatLists (lib.mapAttrsToList (path: lib.mapAttrsToList (rule path)) paths)) tmpfiles.settings);

  script = types.submodule { options = { text = option types.lines ""; deps = option (types.listOf types.str) [ ]; supportsDryActivation = option types.bool false; }; };
in
{
  options = {
    environment = {
      etc = option (types.attrsOf (types.submodule file)) { };
      systemPackages = option (types.listOf types.package) [ ];
      defaultPackages = option (types.listOf types.package) [ ];
      variables = option (types.attrsOf (types.either types.str (types.listOf types.str))) { };
      sessionVariables = option (types.attrsOf types.str) { };
      shellAliases = option (types.attrsOf types.str) { };
      pathsToLink = option (types.listOf types.str) [ ];
    } // lib.genAttrs [ "shellInit" "loginShellInit" "interactiveShellInit" "extraInit" ] (_: option types.lines "");

    systemd.tmpfiles = {
      rules = option (types.listOf types.str) [ ];
      settings = option (types.attrsOf (types.attrsOf (types.attrsOf (types.submodule ruleOptions)))) { };
    };

    system.activationScripts = mkOption {
      type = types.attrsOf (types.coercedTo types.str (text: { inherit text; }) script);
      default = { };
      description = "Lines of bash that activation runs, each after its `deps`.";
    };
  };

  config = {
    environment.systemPackages = with pkgs; [
      bash coreutils curl diffutils findutils getent git gnugrep gnused gnutar gzip iproute2 iputils jq kmod nix openssh procps systemd util-linux
    ];
    environment.etc = {
      "tmpfiles.d/00-nixos.conf" = lib.mkIf (rules != [ ]) { text = lib.concatLines rules; };
      "profile.d/nixos.sh" = lib.mkIf (config.environment.variables != { }) {
        text = lib.concatLines (lib.mapAttrsToList (name: value: "export ${name}=${lib.escapeShellArg (lib.concatStringsSep ":" (lib.toList value))}") config.environment.variables);
      };
    };
    system.activationScripts.tmpfiles = lib.mkIf (rules != [ ]) { deps = [ "users" ]; text = "systemd-tmpfiles --create /etc/tmpfiles.d/00-nixos.conf"; };
    system.activationScripts.users = lib.mkDefault "";
  };
}
