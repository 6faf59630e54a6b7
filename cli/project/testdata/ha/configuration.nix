# The base of [%%nodeName%%].
{ lib, ... }: {
  imports = [ ./hardware-configuration.nix ./networking.nix ]
    ++ map lib.fileset.maybeMissing [ ./cluster_node.nix ./control_node.nix "[%%nodeName%%].nix" ];
  networking.hostName = "[%%nodeName%%]";
  system.stateVersion = "[%%nixVersion%%]";
  users.users.root.openssh.authorizedKeys.keys = [ "[%%sshKey%%]" ];
}
