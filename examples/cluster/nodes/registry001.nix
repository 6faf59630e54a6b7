# The node with the cluster's registry, and its binary cache where it is given a key.
{ ... }:
{
  infrastructure.certs = {
    enable = true;
    caSecretName = "[%%secrets/cluster.ca%%]";
    certSecretName = "[%%secrets/registry001.cert%%]";
    keySecretName = "[%%secrets/registry001.key%%]";
  };

  infrastructure.mesh = {
    ipv4 = "[%%localhost.ipv4%%]";
    subscribe = [ "services" ];
  };

  infrastructure.registry = {
    enable = true;
    # cacheKeySecretName = a secret that holds what nix key generate-secret prints
  };
}
