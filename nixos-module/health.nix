# services.nix-infra-agent.healthChecks: what has to work on the node before a deployment is confirmed. It becomes
# etc/nix-infra/health.json of the system, in the form of docs/health.md.
{ config, lib, ... }:
let
  inherit (lib) mkOption types;
  t = import ./types.nix lib;
  cfg = config.services.nix-infra-agent;
  seconds = least: most: description: t.orNull (types.numbers.between least most) description;
  text = types.addCheck types.str (s: s != "" && lib.stringLength s <= 4096) // { description = "string of 1 to 4096 bytes"; };

  # What a check of each kind needs, and may have.
  kinds = {
    unit = { needs = [ "unit" ]; may = [ ]; };
    tcp = { needs = [ "address" ]; may = [ ]; };
    http = { needs = [ "url" ]; may = [ "status" "body" "body_regex" ]; };
    command = { needs = [ "command" ]; may = [ ]; };
    file = { needs = [ "path" ]; may = [ "contains" ]; };
  };
  common = [ "name" "kind" "interval" "timeout" "grace" ];

  check = types.submodule {
    options = {
      name = mkOption { type = t.line 64; example = "web"; description = "What the record calls it; another for each check."; };
      kind = mkOption { type = types.enum (lib.attrNames kinds); description = "What is tried. Each kind has fields of its own."; };
      interval = seconds 0.1 3600 "Seconds from the start of one try to the next: 2 without it.";
      timeout = seconds 0.1 3600 "Seconds that a try may take: 5 without it.";
      grace = seconds 0 86400 "Seconds from the end of the activation in which failures are forgiven: 30 without it.";

      unit = t.orNull (types.strMatching "[A-Za-z0-9:_.\\\\@-]+\\.[a-z]+") "unit: passes where systemd calls it active; with its type, `app.service`.";
      address = t.orNull (t.address false) "tcp: passes where a connection is accepted.";
      url = t.orNull (types.strMatching "https?://[^/@[:space:][:cntrl:]]+([/?#][^[:space:][:cntrl:]]*)?") "http: is asked by a GET; no name and password in it.";
      status = t.orNull (types.ints.between 100 599) "http: the status that passes, any from 200 to 299 without it.";
      body = t.orNull text "http: a part of the body.";
      body_regex = t.orNull text "http: matches in the body, in Go's syntax.";
      command = t.orNull (types.addCheck (types.nonEmptyListOf types.str) (argv: lib.hasPrefix "/" (lib.head argv)) // { description = "the program's absolute path, and its arguments"; })
        "command: passes where it ends with status 0. It runs as root, without a shell.";
      path = t.orNull t.absolute "file: passes where it exists.";
      contains = t.orNull text "file: a part of what is in it.";
    };
  };

  checks = map t.said cfg.healthChecks;
  names = map (c: c.name) checks;
  document = builtins.toJSON { v = 1; inherit checks; };

  # What is wrong with a check, beyond the types of its fields.
  mistakes = c:
    let
      kind = kinds.${c.kind};
      missing = lib.subtractLists (lib.attrNames c) kind.needs;
      foreign = lib.subtractLists (common ++ kind.needs ++ kind.may) (lib.attrNames c);
      about = "services.nix-infra-agent.healthChecks: the check \"${c.name}\" of kind ${c.kind}";
    in
    [
      { assertion = missing == [ ]; message = "${about} needs ${lib.concatStringsSep ", " missing}."; }
      {
        assertion = foreign == [ ];
        message = "${about} can't have ${lib.concatStringsSep ", " foreign}; it has ${lib.concatStringsSep ", " (common ++ kind.needs ++ kind.may)}.";
      }
    ];
in
{
  options.services.nix-infra-agent.healthChecks = mkOption {
    type = types.listOf check;
    default = [ ];
    example = [ { name = "web"; kind = "http"; url = "http://127.0.0.1:8080/ping"; status = 200; body = "pong"; } ];
    description = "Checks that a system has to pass before a deployment of it is confirmed. No secret in them: everybody can read them.";
  };

  config = lib.mkIf (cfg.enable && checks != [ ]) {
    environment.etc."nix-infra/health.json".text = document;
    assertions = [
      (t.atMost 100 "healthChecks" checks)
      (t.fits "healthChecks" document)
      {
        assertion = lib.allUnique names;
        message = "services.nix-infra-agent.healthChecks: two checks have the same name among ${lib.concatStringsSep ", " names}.";
      }
    ] ++ lib.concatMap mistakes checks;
  };
}
