# A control node: a member of etcd.
{ ... }:
{
  infrastructure.etcd = {
    enable = true;
    initialCluster = [ [%%etcdCluster%%] ];
    initialClusterToken = "[%%etcdClusterToken%%]";
  };
}
