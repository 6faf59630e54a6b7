# infrastructure.podman: containers. The registry of the cluster, where there is one, is reached without TLS: over the overlay
# network, which encrypts.
{ config, lib, ... }:
let
  cfg = config.infrastructure.podman;
in
{
  options.infrastructure.podman = {
    enable = lib.mkEnableOption "podman";

    dockerRegistryHostPort = lib.mkOption {
      type = lib.types.nullOr lib.types.str;
      default = null;
      example = "10.10.13.0:5000";
      description = "host:port of the cluster's registry.";
    };
  };

  config = lib.mkIf cfg.enable {
    virtualisation.podman = {
      enable = true;
      dockerCompat = true;
      defaultNetwork.settings.dns_enabled = true;
    };
    virtualisation.containers.registries.insecure = lib.optional (cfg.dockerRegistryHostPort != null) cfg.dockerRegistryHostPort;
  };
}
