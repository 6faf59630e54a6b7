{ lib, ... }: {
  imports = [ ./hardware-configuration.nix ./networking.nix ] ++ map lib.fileset.maybeMissing [
    ./modules/default.nix
    ./app_modules/default.nix
    ./cluster_node.nix
    ./standalone_machine.nix
    ./[%%nodeName%%].nix
  ];
  networking.hostName = "[%%nodeName%%]";
  system.stateVersion = "[%%nixVersion%%]";
  users.users.root.openssh.authorizedKeys.keys = [ ''[%%sshKey%%]'' ];
}
