# What runs on node001. The file of a node has its name, and placeholders are filled in here.
{ ... }:
{
  infrastructure.hello = {
    enable = true;
    bindToIp = "[%%localhost.ipv4%%]";
    messageSecretName = "[%%secrets/hello.message%%]";
  };
}
