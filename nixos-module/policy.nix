# services.nix-infra-agent.policy: what the node lets whom do beyond the defaults. It becomes etc/nix-infra/policy.json of
# the system, in the form of docs/policy.md, which the agent reads anew for each order.
{ config, lib, ... }:
let
  inherit (lib) mkOption types;
  t = import ./types.nix lib;
  cfg = config.services.nix-infra-agent;
  submodule = options: types.submodule { inherit options; };
  flag = description: mkOption { type = types.bool; default = false; inherit description; };
  seconds = description: t.orNull (types.ints.between 1 86400) description;

  options' = t.list (submodule {
    names = mkOption {
      type = types.nonEmptyListOf (types.strMatching "--?[A-Za-z0-9][A-Za-z0-9._-]*");
      example = [ "-n" "--lines" ];
      description = "All its spellings. A long one is never abbreviated.";
    };
    value = t.orNull t.pattern "The pattern of its value; without one it has none.";
    not = t.orNull t.pattern "The pattern of values that are refused all the same.";
    optional = flag "Whether the value may be left out.";
    loose = flag "Whether an optional value may be the next word.";
    many = flag "Whether it may come more than once.";
  }) "Options, as they may be spelled.";

  operand = submodule {
    what = mkOption { type = t.line 256; example = "a unit"; description = "What it is, for people."; };
    pattern = mkOption { type = t.pattern; description = "RE2, of the whole operand. None ever begins with `-`."; };
    not = t.orNull t.pattern "The pattern of those that are refused all the same.";
    min = t.orNull types.ints.unsigned "How often it has to come: 0 without it.";
    max = t.orNull types.ints.positive "How often it may come: once without it.";
  };

  form = submodule {
    words = t.list (types.strMatching "[A-Za-z0-9][A-Za-z0-9._:|-]*") "The subcommand, word by word; each may have alternatives, `show|list`.";
    options = options';
    operands = t.list operand "Kinds of operands, in their order.";
  };

  rule = submodule {
    name = mkOption { type = t.line 256; description = "What refusals and the record call it."; };
    program = mkOption {
      type = types.strMatching "[A-Za-z0-9][A-Za-z0-9._+-]*|(/[^/[:cntrl:]]+)+";
      description = "A name, looked up among the system's programs, or an absolute path; a command has to spell it so.";
    };
    role = t.role t.people;
    style = t.orNull (types.enum [ "words" ]) "How it reads options: `words` for `-name VALUE`, as `find` and `ip` have them.";
    forms = t.list form "The ways to call it; none: without subcommand and operands.";
    options = options';
    denied = t.list (submodule {
      names = mkOption { type = types.nonEmptyListOf (t.line 256); description = "Options and subcommands."; };
      why = mkOption { type = t.line 256; description = "Why they can't be had."; };
    }) "What people will try, and why they can't have it.";
    defaults = t.list (t.line 256) "Options that are put in front where a command does not have them.";
    env = t.list (submodule {
      name = mkOption { type = types.strMatching "[A-Za-z_][A-Za-z0-9_]*"; description = "Its name."; };
      value = mkOption { type = types.str; description = "Its value, in which `{node}` is the node's name. No secret: everybody can read it."; };
      if_exists = flag "Whether it is set only where the value is the path of something that is there.";
    }) "Environment variables.";
    user = t.orNull t.account "Whom it runs as: `root`, a user's name, or, without it, `nobody` in a sandbox.";
    groups = t.list t.account "More groups of that user.";
    timeout = seconds "Seconds that it may take: 60 without it, up to a day.";
    output = t.orNull (types.ints.between 1 1073741824) "Bytes that it may print: 16 MiB without it, up to 1 GiB.";
  };

  document = t.said (cfg.policy // {
    defaultCommands = if cfg.policy.defaultCommands then null else false;
    allowShell = if cfg.policy.allowShell == false then null else cfg.policy.allowShell;
  });
  text = builtins.toJSON ({ v = 1; } // document);
in
{
  options.services.nix-infra-agent.policy = {
    commands = t.list rule ''
      Rules for commands, beside the defaults and before them. A rule is as safe as its program: none for a shell, an
      interpreter, or anything else that can be told to run other programs.
    '';
    defaultCommands = mkOption {
      type = types.bool;
      default = true;
      description = "Whether the rules that every node has count, too.";
    };
    allowShell = mkOption {
      type = types.either types.bool (submodule {
        timeout = mkOption { type = types.ints.between 1 86400; default = 3600; description = "Seconds that a text may run."; };
      });
      default = false;
      example.timeout = 600;
      description = "Whether admins may have a shell run any text, **as root**.";
    };
    tunnels = t.list (submodule {
      address = mkOption { type = t.address true; example = "127.0.0.1:5432"; description = "Where tunnels may lead to; `host:*` for all its ports."; };
      role = t.role t.actors;
    }) "Addresses that tunnels may lead to, beside the defaults.";
    uploads.roots = t.list (submodule {
      path = mkOption { type = t.uploadFolder; example = "/var/lib/app/import"; description = "The folder."; };
      role = t.role t.actors;
    }) "Folders that take uploads, beside `/root/uploads`. What is uploaded is root's.";
    files.roots = t.list t.folder "Folders below which `nix-infra files` reads everything, as root does. No folder that has secrets.";
    actions = {
      memory = t.orNull (types.addCheck types.ints.positive (n: n >= 16777216) // { description = "integer of at least 16777216 (16 MiB)"; })
        "Bytes that an action and its children may take: 1 GiB without it.";
      tasks = t.orNull types.ints.positive "Processes and threads: 1024 without it.";
      timeout = seconds "Seconds: 3600 without it, up to a day.";
    };
  };

  config = lib.mkIf (cfg.enable && document != { }) {
    environment.etc."nix-infra/policy.json".text = text;
    assertions = with cfg.policy; [
      (t.atMost 128 "policy.commands" commands)
      (t.atMost 128 "policy.tunnels" tunnels)
      (t.atMost 32 "policy.uploads.roots" uploads.roots)
      (t.atMost 32 "policy.files.roots" files.roots)
      (t.fits "policy" text)
    ];
  };
}
