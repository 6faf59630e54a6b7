# What the nodes allow beyond the defaults of their agent. The agent itself comes from nix-infra/, and so does the controller on
# the machine that is one. Every option is in docs/policy.md and docs/health.md of nix-infra.
{ ... }:
{
  services.nix-infra-agent.policy = {
    # What an app module's action.sh may take.
    actions = { memory = 536870912; timeout = 600; };

    # A command that is not among the defaults is a rule: a program, and the words, options and values that it may be called
    # with. This one is for viewers: nix-infra exec NODE -- zramctl --output-all
    commands = [
      { name = "compressed swap"; program = "zramctl"; role = "viewer"; options = [ { names = [ "--output-all" ]; } ]; }
    ];
  };
}
