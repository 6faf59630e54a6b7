# All modules of nix-infra. Importing them changes nothing: each has to be enabled.
{
  imports = [ ./agent.nix ./controller.nix ./secrets.nix ];
}
