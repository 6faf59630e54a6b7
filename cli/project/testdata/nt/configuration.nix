{ ... }: { networking.hostName = "[%%nodeName%%]"; users.users.root.openssh.authorizedKeys.keys = [ "[%%sshKey%%]" ]; }
