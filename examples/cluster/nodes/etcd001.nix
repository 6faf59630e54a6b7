# The control node: a member of etcd and, where it was the first machine, the controller of nix-infra.
{ ... }:
{
  infrastructure.certs = {
    enable = true;
    caSecretName = "[%%secrets/cluster.ca%%]";
    certSecretName = "[%%secrets/etcd001.cert%%]";
    keySecretName = "[%%secrets/etcd001.key%%]";
  };
}
