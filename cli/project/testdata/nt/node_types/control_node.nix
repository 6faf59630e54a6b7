{ ... }: { infrastructure.etcd.initialCluster = [ [%%etcdCluster%%] ]; infrastructure.etcd.initialClusterToken = "[%%etcdClusterToken%%]"; }
