# A node for databases and the like: what it runs belongs to the group services.
{ ... }:
{
  infrastructure.certs = {
    enable = true;
    caSecretName = "[%%secrets/cluster.ca%%]";
    certSecretName = "[%%secrets/service001.cert%%]";
    keySecretName = "[%%secrets/service001.key%%]";
  };

  infrastructure.mesh = {
    ipv4 = "[%%localhost.ipv4%%]";
    subscribe = [ "services" ];
  };
}
