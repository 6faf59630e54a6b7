# testnode001 while the test `hello` runs.
{ ... }:
{
  infrastructure.hello = {
    enable = true;
    bindToPort = 8099;
    messageSecretName = "[%%secrets/hello.test-message%%]";
  };
}
