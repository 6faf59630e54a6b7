# A node for apps. It does not subscribe to backends: what it runs itself listens on the same ports.
{ ... }:
{
  infrastructure.certs = {
    enable = true;
    caSecretName = "[%%secrets/cluster.ca%%]";
    certSecretName = "[%%secrets/worker001.cert%%]";
    keySecretName = "[%%secrets/worker001.key%%]";
  };

  infrastructure.mesh = {
    ipv4 = "[%%localhost.ipv4%%]";
    subscribe = [ "services" ];
  };

  infrastructure.hello = {
    enable = true;
    messageSecretName = "[%%secrets/hello.message%%]";
  };
  infrastructure.hello-pod.enable = true;
}
