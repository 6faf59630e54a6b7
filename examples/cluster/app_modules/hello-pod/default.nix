# infrastructure.hello-pod: a container in the mesh. Nix builds its image, so that it needs no registry.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.infrastructure.hello-pod;
  image = pkgs.dockerTools.buildImage {
    name = "hello";
    tag = "latest";
    copyToRoot = [ pkgs.busybox (pkgs.writeTextDir "www/index.html" "hello from a container\n") ];
    config.Cmd = [ "/bin/busybox" "httpd" "-f" "-h" "/www" "-p" (toString cfg.bindToPort) ];
  };
in
{
  options.infrastructure.hello-pod = {
    enable = lib.mkEnableOption "a container that says hello";
    bindToPort = mkOption { type = types.port; default = 8090; description = "TCP port that it listens on."; };
  };

  config = lib.mkIf cfg.enable {
    infrastructure.oci-containers.containers.hello-pod = {
      image = "localhost/hello:latest";
      imageFile = image;
      networkType = "host";
      bindToIp = null;
      app = { serviceGroup = "backends"; port = cfg.bindToPort; envPrefix = "HELLO_POD_"; };
    };
  };
}
