# Units: NixOS's options for them, and the files that they become.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkIf mkOption optionalAttrs types;
  cfg = config.systemd;
  option = type: default: mkOption { inherit type default; };
  names = option (types.listOf types.str) [ ];

  # A setting of a unit: one value, or several that add up.
  setting = types.mkOptionType {
    name = "systemd option";
    check = with types; (nullOr (oneOf [ bool int float str path package (listOf (nullOr (oneOf [ bool int float str path package ]))) ])).check;
    merge = loc: defs: if lib.any (def: lib.isList def.value) defs then lib.concatMap (def: lib.toList def.value) defs else lib.mergeEqualOption loc defs;
  };
  section = option (types.attrsOf setting) { };

  dependencies = {
    after = "After"; before = "Before"; requires = "Requires"; wants = "Wants"; bindsTo = "BindsTo"; partOf = "PartOf"; conflicts = "Conflicts";
    requisite = "Requisite"; upholds = "Upholds"; onFailure = "OnFailure"; onSuccess = "OnSuccess"; documentation = "Documentation";
    requiresMountsFor = "RequiresMountsFor";
  };
  common = lib.mapAttrs (_: _: names) (removeAttrs dependencies [ "requiresMountsFor" ]) // {
    enable = option types.bool true;
    description = option types.singleLineStr "";
    unitConfig = section;
    wantedBy = names;
    requiredBy = names;
    upheldBy = names;
    aliases = names;
    overrideStrategy = option (types.enum [ "asDropinIfExists" "asDropin" ]) "asDropinIfExists";
    startLimitIntervalSec = mkOption { type = types.int; };
    startLimitBurst = mkOption { type = types.int; };
    restartTriggers = option (types.listOf types.unspecified) [ ];
    reloadTriggers = option (types.listOf types.unspecified) [ ];
  };

  lines = option types.lines "";
  scripts = { preStart = "ExecStartPre"; script = "ExecStart"; postStart = "ExecStartPost"; reload = "ExecReload"; preStop = "ExecStop"; postStop = "ExecStopPost"; };
  service = { name, config, ... }: {
    options = common // lib.mapAttrs (_: _: lines) scripts // {
      serviceConfig = section;
      environment = option (types.attrsOf (types.nullOr (types.oneOf [ types.str types.path types.package types.int ]))) { };
      path = option (types.listOf (types.oneOf [ types.package types.str ])) [ ];
      scriptArgs = option types.str "";
      restartIfChanged = option types.bool true;
      reloadIfChanged = option types.bool false;
      stopIfChanged = option types.bool true;
      notSocketActivated = option types.bool false;
      startAt = mkOption { type = types.either types.str (types.listOf types.str); default = [ ]; apply = lib.toList; };
    };
    config = lib.mkMerge ([
      {
        path = lib.mkAfter (with pkgs; [ coreutils findutils gnugrep gnused systemd ]);
        environment.PATH = "${lib.makeBinPath config.path}:${lib.makeSearchPath "sbin" config.path}";
      }
    ] ++ lib.mapAttrsToList (option: directive: mkIf (config.${option} != "") {
      serviceConfig.${directive} = [ "${pkgs.writeShellScript "unit-script-${lib.replaceStrings [ "@" "\\" ] [ "_" "_" ] name}-${option}" "set -e\n${config.${option}}"}${lib.optionalString (option == "script" && config.scriptArgs != "") " ${config.scriptArgs}"}" ];
    }) scripts);
  };

  kind = more: option (types.attrsOf (types.submodule { options = common // more; })) { };

  # --- rendering
  value = v: if lib.isBool v then lib.boolToString v else toString v;
  render = settings: lib.concatStrings (lib.concatLists (lib.mapAttrsToList (key: values:
    map (v: "${key}=${value v}\n") (lib.filter (v: v != null) (lib.toList values))) settings));
  hash = triggers: builtins.hashString "sha256" (builtins.unsafeDiscardStringContext (toString triggers));
  unit = u: title: body: ''
    [Unit]
    ${render (
      lib.filterAttrs (_: v: v != [ ]) (lib.mapAttrs' (name: key: lib.nameValuePair key (lib.concatStringsSep " " u.${name})) (lib.filterAttrs (name: _: u.${name} or [ ] != [ ]) dependencies))
      // optionalAttrs (u.description != "") { Description = u.description; }
      // optionalAttrs (u.restartTriggers != [ ]) { X-Restart-Triggers = hash u.restartTriggers; }
      // optionalAttrs (u.reloadTriggers != [ ]) { X-Reload-Triggers = hash u.reloadTriggers; }
      // limit "StartLimitIntervalSec" u.startLimitIntervalSec // limit "StartLimitBurst" u.startLimitBurst
      // u.unitConfig)}
  '' + lib.optionalString (title != null) "[${title}]\n${body}";
  limit = key: v: let tried = builtins.tryEval v; in optionalAttrs tried.success { ${key} = tried.value; };

  make = type: title: body: lib.mapAttrs' (name: u: lib.nameValuePair "${name}.${type}" {
    inherit (u) enable wantedBy requiredBy upheldBy overrideStrategy;
    text = unit u title (body u);
  });
  services = lib.mapAttrs' (name: s: lib.nameValuePair "${name}.service" {
    inherit (s) enable wantedBy requiredBy upheldBy restartIfChanged reloadIfChanged stopIfChanged;
    # One of Debian's own, when it does not say what it runs.
    overrideStrategy = if s.serviceConfig ? ExecStart || s.serviceConfig ? ExecStop then s.overrideStrategy else "asDropin";
    text = unit s "Service" (lib.concatStrings (lib.mapAttrsToList (n: v: "Environment=${builtins.toJSON "${n}=${toString v}"}\n") (lib.filterAttrs (_: v: v != null) s.environment)) + render s.serviceConfig);
  }) cfg.services;
  timersOf = lib.mapAttrs (_: s: { wantedBy = [ "timers.target" ]; timerConfig.OnCalendar = s.startAt; }) (lib.filterAttrs (_: s: s.startAt != [ ]) cfg.services);
  mounts = lib.listToAttrs (map (m: lib.nameValuePair (escapePath m.where) (m // { mountConfig = { What = m.what; Where = m.where; } // optionalAttrs (m.type != "") { Type = m.type; } // optionalAttrs (m.options != "") { Options = m.options; } // m.mountConfig; })) cfg.mounts);
  escapePath = path: lib.replaceStrings [ "-" "/" ] [ "\\x2d" "-" ] (lib.removePrefix "/" path);
in
{
  options.systemd = {
    services = option (types.attrsOf (types.submodule service)) { };
    sockets = kind { socketConfig = section; listenStreams = names; listenDatagrams = names; };
    timers = kind { timerConfig = section; };
    paths = kind { pathConfig = section; };
    targets = kind { };
    slices = kind { sliceConfig = section; };
    mounts = option (types.listOf (types.submodule {
      options = common // { what = mkOption { type = types.str; }; where = mkOption { type = types.str; }; type = option types.str ""; options = option types.commas ""; mountConfig = section; };
    })) [ ];
    units = option (types.attrsOf (types.submodule {
      options = {
        text = option (types.nullOr types.str) null;
        enable = option types.bool true;
        wantedBy = names;
        requiredBy = names;
        upheldBy = names;
        overrideStrategy = option types.str "asDropinIfExists";
        restartIfChanged = option types.bool true;
        reloadIfChanged = option types.bool false;
        stopIfChanged = option types.bool true;
      };
    })) { };
    package = option types.package pkgs.systemd;
    globalEnvironment = option (types.attrsOf types.str) { };
    enableEmergencyMode = option types.bool true;
    extraConfig = option types.lines "";
  } // lib.genAttrs [ "settings" "network" "user" "coredump" "oomd" "sleep" "watchdog" "enableStrictShellChecks" ] (_: option types.anything { });

  config.systemd = {
    timers = timersOf;
    units = services
      // make "socket" "Socket" (u: render ({ ListenStream = u.listenStreams; ListenDatagram = u.listenDatagrams; } // u.socketConfig)) cfg.sockets
      // make "timer" "Timer" (u: render u.timerConfig) cfg.timers
      // make "path" "Path" (u: render u.pathConfig) cfg.paths
      // make "slice" "Slice" (u: render u.sliceConfig) cfg.slices
      // make "mount" "Mount" (u: render u.mountConfig) mounts
      // make "target" null (_: "") cfg.targets;
  };
}
