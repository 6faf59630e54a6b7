# The base system and the import slots. Everything that a deploy renders lies flat beside this file.
{ nodeName, ... }:
let
  whenPresent = builtins.filter builtins.pathExists;
in
{
  # The node's own two files come first and are not optional: without them this is not that machine.
  imports = [
    ./hardware-configuration.nix
    ./networking.nix
  ] ++ whenPresent [
    ./modules/default.nix
    ./cluster_node.nix
    ./control_node.nix
    ./standalone_machine.nix
    ./app_modules/default.nix
    (./. + "/${nodeName}.nix")
  ];

  etc."testos/node".text = "[%%nodeName%%] [%%nixVersion%%]\n";

  # A copy, not a link: sshd refuses keys below a directory that a group may write, as /nix/store is.
  etc."ssh/authorized_keys.d/root" = {
    text = "[%%sshKey%%]\n";
    mode = "0600";
  };
}
