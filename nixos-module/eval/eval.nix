# Evaluates modules with nixpkgs' own lib, over a stand-in of the NixOS options that ours set, and tells what they make:
# failed assertions, units, files in /etc, firewall ports. It is no NixOS: an option that NixOS has not got would be found
# only where the stand-in has not got it either. check.sh runs it; ../test.nix is the whole truth, where there is nixpkgs.
{ libPath, modules }:
let
  lib = import libPath;
  inherit (lib) mkOption types;
  option = type: default: mkOption { inherit type default; };
  needed = type: mkOption { inherit type; };
  any = option types.raw null;
  names = option (types.listOf types.str) [ ];

  package = pname: { type = "derivation"; name = pname; inherit pname; version = "257"; outPath = "/store/${pname}"; };
  pkgs = lib.genAttrs [ "coreutils" "nix-infra-agent" "nix-infra-controller" ] package // {
    formats.yaml = _: {
      type = let t = types.nullOr (types.oneOf [ types.bool types.int types.float types.str (types.attrsOf t) (types.listOf t) ]); in t;
      generate = name: value: "/store/${name}:${builtins.toJSON value}";
    };
  };

  # systemd's settings: one value, or a list of values that several modules add to.
  atom = types.nullOr (types.oneOf [ types.bool types.int types.float types.str ]);
  section = option (types.attrsOf (types.either (types.listOf atom) atom)) { };
  service = types.submodule {
    options = lib.genAttrs [ "after" "before" "wants" "requires" "wantedBy" "partOf" "bindsTo" "conflicts" ] (_: names) // {
      description = option types.singleLineStr "";
      unitConfig = section;
      serviceConfig = section;
      environment = option (types.attrsOf (types.nullOr (types.oneOf [ types.str types.path types.package ]))) { };
      path = option (types.listOf (types.either types.package types.str)) [ ];
      script = option types.lines "";
      overrideStrategy = option (types.enum [ "asDropinIfExists" "asDropin" ]) "asDropinIfExists";
      startLimitIntervalSec = needed types.int;
      restartIfChanged = option types.bool true;
      stopIfChanged = option types.bool true;
    };
    config.environment.PATH = "/store/coreutils/bin"; # as a definition that a module has to override
  };

  setting = value: if value == true then "true" else if value == false then "false" else toString value;
  lines = settings: lib.concatStrings (lib.concatLists (lib.mapAttrsToList (key: value:
    map (v: "${key}=${setting v}\n") (lib.filter (v: v != null) (lib.toList value))) settings));
  unit = s: lib.concatStrings [
    "[Unit]\n"
    (lines (s.unitConfig
      // lib.filterAttrs (_: v: v != "") { Description = s.description; After = toString s.after; Wants = toString s.wants; Requires = toString s.requires; }
      // (let i = builtins.tryEval s.startLimitIntervalSec; in lib.optionalAttrs i.success { StartLimitIntervalSec = i.value; })))
    "\n[Service]\n"
    (lib.concatStrings (lib.mapAttrsToList (n: v: "Environment=${builtins.toJSON "${n}=${v}"}\n") s.environment))
    (lib.optionalString (!s.restartIfChanged) "X-RestartIfChanged=false\n")
    (lib.optionalString (!s.stopIfChanged) "X-StopIfChanged=false\n")
    (lib.optionalString (s.script != "") "ExecStart=/store/script\n")
    (lines s.serviceConfig)
    (lib.optionalString (s.wantedBy != [ ]) "\n[Install]\nWantedBy=${toString s.wantedBy}\n")
  ];

  range = types.submodule { options = { from = needed types.port; to = needed types.port; }; };
  standIn = {
    options = {
      assertions = option (types.listOf types.unspecified) [ ];
      environment.etc = option (types.attrsOf (types.submodule { options.text = needed types.lines; })) { };
      environment.systemPackages = option (types.listOf types.package) [ ];
      networking.firewall = {
        enable = option types.bool true;
        allowedTCPPorts = option (types.listOf types.port) [ ];
        allowedTCPPortRanges = option (types.listOf range) [ ];
      };
      nix.enable = option types.bool true;
      security.apparmor = {
        enable = option types.bool false;
        policies = option (types.attrsOf (types.submodule { options = { state = needed (types.enum [ "disable" "complain" "enforce" ]); profile = needed types.lines; }; })) { };
      };
      services.openssh = {
        enable = option types.bool false;
        openFirewall = option types.bool true;
        ports = option (types.listOf types.port) [ 22 ];
      };
      systemd.package = option types.package (package "systemd");
      systemd.services = option (types.attrsOf service) { };
      users.users = option (types.attrsOf (types.submodule {
        options = { isSystemUser = option types.bool false; group = option types.str ""; home = option types.path "/var/empty"; };
      })) { };
      users.groups = option (types.attrsOf (types.submodule { options.gid = any; })) { };
    };
  };

  eval = lib.evalModules { modules = [ standIn { _module.args = { inherit pkgs; }; } ] ++ modules; };
  inherit (eval) config;
  # Options of ours are read whole, so that a wrong value is found even where nothing uses it.
  ours = lib.filter (o: lib.elem (lib.head o.loc) [ "services" "nix-infra" ] && lib.last (lib.init o.loc) != "openssh") (lib.collect lib.isOption eval.options);
  readable = v: if lib.isDerivation v then v.outPath else if lib.isAttrs v then lib.mapAttrs (_: readable) v else if lib.isList v then map readable v else v;
in
builtins.deepSeq (map (o: readable o.value) ours) {
  failed = map (a: a.message) (lib.filter (a: !a.assertion) config.assertions);
  units = lib.mapAttrs' (n: s: lib.nameValuePair "${n}.service" (unit s)) config.systemd.services;
  etc = lib.mapAttrs (_: e: e.text) config.environment.etc;
  ports = config.networking.firewall.allowedTCPPorts;
  ssh = config.services.openssh.openFirewall;
  users = lib.attrNames config.users.users;
  profiles = lib.mapAttrs (_: p: p.profile) config.security.apparmor.policies;
  undocumented = map (o: lib.showOption o.loc) (lib.filter (o: o.description or "" == "") ours);
}
