{ lib, ... }: {
  imports = [ ./hardware-configuration.nix ./networking.nix (lib.fileset.maybeMissing ./cluster_node.nix) (lib.fileset.maybeMissing ./control_node.nix) ];
  networking.hostName = "[%%nodeName%%]"; users.users.root.openssh.authorizedKeys.keys = [ "[%%sshKey%%]" ];
}
