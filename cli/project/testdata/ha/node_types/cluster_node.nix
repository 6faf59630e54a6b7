{ ... }: { infrastructure.overlay.members = [ [%%etcdCluster%%] ]; }
