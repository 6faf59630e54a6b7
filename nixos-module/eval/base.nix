# What the lines of cases.txt add their mistakes to.
{
  services.nix-infra-agent.enable = true;
  services.nix-infra-controller.enable = true;
}
