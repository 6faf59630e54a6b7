{ ... }: { imports = [ ./sub/etcd.nix ]; }
