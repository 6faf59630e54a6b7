# Modules that every node has.
{
  imports = [ ./agent.nix ];
}
