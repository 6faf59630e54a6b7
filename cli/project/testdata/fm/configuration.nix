{ ... }: {
  networking.hostName = "[%%nodeName%%]";
  system.stateVersion = "[%%nixVersion%%]";
  users.users.root.openssh.authorizedKeys.keys = [ ''[%%sshKey%%]'' ];
}
