# The node that lets the world in: nginx, which reaches the apps through the mesh.
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
    subscribe = [ "frontends" "backends" ];
  };

  networking.firewall.allowedTCPPorts = [ 80 443 ];
  services.nginx = {
    enable = true;
    recommendedProxySettings = true;
    # For TLS: security.acme, and enableACME and forceSSL beside the location.
    virtualHosts.default = {
      default = true;
      locations."/".proxyPass = "http://127.0.0.1:8080";
    };
  };
}
