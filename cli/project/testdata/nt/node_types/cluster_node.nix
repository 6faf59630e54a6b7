{ ... }: { virtualisation.podman.enable = true; infrastructure.overlay.members = [ [%%etcdCluster%%] ]; }
