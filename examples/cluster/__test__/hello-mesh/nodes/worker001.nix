# worker001 while the test `hello-mesh` runs.
{ ... }:
{
  infrastructure.certs = {
    enable = true;
    caSecretName = "[%%secrets/cluster.ca%%]";
    certSecretName = "[%%secrets/worker001.cert%%]";
    keySecretName = "[%%secrets/worker001.key%%]";
  };
  infrastructure.mesh.ipv4 = "[%%localhost.ipv4%%]";
  infrastructure.hello.enable = true;
}
