# A node of the cluster that runs containers: the overlay network, the service mesh, and podman.
{ ... }:
{
  infrastructure.flannel = { enable = true; etcdCluster = [ [%%etcdCluster%%] ]; };
  infrastructure.mesh = { enable = true; etcdCluster = [ [%%etcdCluster%%] ]; };
  infrastructure.podman.enable = true;
}
