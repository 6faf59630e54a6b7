# ingress001 while the test `hello-mesh` runs.
{ ... }:
{
  infrastructure.certs = {
    enable = true;
    caSecretName = "[%%secrets/cluster.ca%%]";
    certSecretName = "[%%secrets/ingress001.cert%%]";
    keySecretName = "[%%secrets/ingress001.key%%]";
  };
  infrastructure.mesh = {
    ipv4 = "[%%localhost.ipv4%%]";
    subscribe = [ "backends" ];
  };
}
