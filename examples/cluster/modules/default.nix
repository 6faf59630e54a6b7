# Modules that every node has. Each is off until a node type or a node's own file enables it.
{
  imports = [ ./agent.nix ./certs.nix ./etcd.nix ./flannel.nix ./mesh.nix ./oci-containers.nix ./podman.nix ./registry.nix ];
}
