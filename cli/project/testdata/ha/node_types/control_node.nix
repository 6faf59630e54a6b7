{ ... }: {
  infrastructure.etcd = { initialCluster = [ [%%etcdCluster%%] ]; initialClusterToken = "[%%etcdClusterToken%%]"; };
}
