# A node that lets the world in: as a cluster node, without containers. On the node it is cluster_node.nix, too.
{ ... }:
{
  infrastructure.flannel = { enable = true; etcdCluster = [ [%%etcdCluster%%] ]; };
  infrastructure.mesh = { enable = true; etcdCluster = [ [%%etcdCluster%%] ]; };
}
