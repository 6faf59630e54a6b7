# Users and groups, which activation makes and changes with Debian's tools. Nobody is ever removed.
{ config, lib, pkgs, ... }:
let
  inherit (lib) escapeShellArg mkDefault mkIf mkOption types;
  cfg = config.users;
  option = type: default: mkOption { inherit type default; };
  entry = types.passwdEntry types.str;
  orNull = type: option (types.nullOr type) null;

  user = { name, config, ... }: {
    options = {
      enable = option types.bool true;
      name = mkOption { type = entry; };
      description = option entry "";
      uid = orNull types.int;
      isSystemUser = option types.bool false;
      isNormalUser = option types.bool false;
      group = option types.str "";
      extraGroups = option (types.listOf types.str) [ ];
      home = option (types.passwdEntry types.path) "/var/empty";
      homeMode = option (types.strMatching "[0-7]{1,5}") "700";
      createHome = option types.bool false;
      useDefaultShell = option types.bool false;
      shell = option (types.nullOr (types.either types.shellPackage (types.passwdEntry types.path))) "/usr/sbin/nologin";
      linger = option types.bool false;
      packages = option (types.listOf types.package) [ ];
      openssh.authorizedKeys.keys = option (types.listOf types.singleLineStr) [ ];
      openssh.authorizedKeys.keyFiles = option (types.listOf types.path) [ ];
    } // lib.genAttrs [ "password" "initialPassword" "hashedPassword" "initialHashedPassword" "hashedPasswordFile" ] (_: orNull entry);
    config = lib.mkMerge [
      { name = mkDefault name; }
      (mkIf config.isNormalUser { group = mkDefault "users"; createHome = mkDefault true; home = mkDefault "/home/${config.name}"; shell = mkDefault "/bin/bash"; })
      (mkIf config.useDefaultShell { shell = mkDefault "/bin/bash"; })
    ];
  };
  group = { name, ... }: {
    options = { name = mkOption { type = entry; }; gid = orNull types.int; members = option (types.listOf entry) [ ]; };
    config.name = mkDefault name;
  };

  users = lib.filter (u: u.enable && u.name != "root") (lib.attrValues cfg.users);
  groups = lib.filter (g: g.name != "root") (lib.attrValues cfg.groups);
  shellOf = u: if u.shell == null then "/usr/sbin/nologin" else if u.shell ? shellPath then "${u.shell}${u.shell.shellPath}" else "${u.shell}";
  membersOf = g: lib.unique (g.members ++ map (u: u.name) (lib.filter (u: lib.elem g.name u.extraGroups) users));

  makeGroup = g: ''
    getent group ${g.name} >/dev/null || groupadd --system ${lib.optionalString (g.gid != null) "--gid ${toString g.gid}"} ${g.name}
  '';
  makeUser = u:
    let
      entry = "--home-dir ${escapeShellArg u.home} --shell ${escapeShellArg (shellOf u)} --gid ${u.group} --comment ${escapeShellArg u.description}";
      uid = lib.optionalString (u.uid != null) "--uid ${toString u.uid}";
    in
    ''
      if ! getent passwd ${u.name} >/dev/null; then
        useradd --no-log-init --no-create-home ${lib.optionalString (!u.isNormalUser) "--system"} ${uid} ${entry} ${u.name}
      elif [ "$(getent passwd ${u.name} | cut -d: -f5-)" != ${escapeShellArg "${u.description}:${u.home}:${shellOf u}"} ]; then
        usermod --home ${escapeShellArg u.home} --shell ${escapeShellArg (shellOf u)} --comment ${escapeShellArg u.description} ${u.name}
      fi
      ${lib.optionalString u.createHome "install -d -m ${u.homeMode} -o ${u.name} -g ${u.group} ${escapeShellArg u.home}"}
    '';
  addMembers = g: lib.concatMapStrings (name: ''
    id -nG ${name} | grep -qw ${g.name} || usermod --append --groups ${g.name} ${name}
  '') (membersOf g);

  keysOf = u: u.openssh.authorizedKeys.keys ++ map (f: lib.removeSuffix "\n" (builtins.readFile f)) u.openssh.authorizedKeys.keyFiles;
in
{
  options.users = {
    mutableUsers = option types.bool true;
    allowNoPasswordLogin = option types.bool false;
    defaultUserShell = option (types.either types.path types.shellPackage) pkgs.bashInteractive;
    motd = orNull types.lines;
    users = option (types.attrsOf (types.submodule user)) { };
    groups = option (types.attrsOf (types.submodule group)) { };
  };

  config = {
    users.users.root = { uid = 0; group = "root"; home = "/root"; };
    users.groups = { root.gid = 0; users.gid = 100; wheel = { }; };

    assertions = lib.concatMap (u: [
      {
        assertion = u.isSystemUser != u.isNormalUser || (u.uid != null && u.uid < 1000);
        message = "Exactly one of users.users.${u.name}.isSystemUser and users.users.${u.name}.isNormalUser must be set.";
      }
      { assertion = u.group != ""; message = "users.users.${u.name}.group is unset. This used to default to nogroup, but this is unsafe."; }
      { assertion = u.group == "" || lib.any (g: g.name == u.group) (lib.attrValues cfg.groups); message = "users.users.${u.name} has a primary group that is undefined: ${u.group}"; }
    ]) users;

    system.activationScripts.users = lib.mkForce (lib.concatMapStrings makeGroup groups + lib.concatMapStrings makeUser users + lib.concatMapStrings addMembers groups);

    # Copies: sshd refuses keys below a folder that a group may write, as the store is.
    environment.etc = lib.mapAttrs' (_: u: lib.nameValuePair "ssh/authorized_keys.d/${u.name}" { mode = "0444"; text = lib.concatLines (keysOf u); })
      (lib.filterAttrs (_: u: keysOf u != [ ]) cfg.users);
  };
}
