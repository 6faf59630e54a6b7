# infrastructure.registry: a registry of container images and, with a key, a binary cache of Nix, for the nodes of the overlay network.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.infrastructure.registry;
  sandbox = {
    Restart = "always";
    RestartSec = 5;
    DynamicUser = true;
    CapabilityBoundingSet = "";
    ProtectHome = true;
    PrivateDevices = true;
    RestrictAddressFamilies = [ "AF_INET" "AF_INET6" "AF_UNIX" ];
  };
in
{
  options.infrastructure.registry = {
    enable = lib.mkEnableOption "the cluster's registry";
    bindToIp = mkOption { type = types.str; default = "0.0.0.0"; description = "Where it listens. The firewall lets in the overlay network only."; };
    port = mkOption { type = types.port; default = 5000; description = "Of the registry."; };
    cachePort = mkOption { type = types.port; default = 1099; description = "Of the binary cache."; };
    cacheKeySecretName = mkOption {
      type = types.nullOr types.str;
      default = null;
      description = "Name of the secret with the key that the binary cache signs with (nix key generate-secret); null: there is no cache.";
    };
  };

  config = lib.mkIf cfg.enable {
    networking.firewall.interfaces.flannel-wg.allowedTCPPorts = [ cfg.port ] ++ lib.optional (cfg.cacheKeySecretName != null) cfg.cachePort;
    nix-infra.secrets = lib.mkIf (cfg.cacheKeySecretName != null) { ${cfg.cacheKeySecretName}.units = [ "nix-cache" ]; };

    systemd.services = {
      registry = {
        description = "registry of container images";
        wantedBy = [ "multi-user.target" ];
        wants = [ "flannel.service" ];
        after = [ "network.target" "flannel.service" ];
        serviceConfig = sandbox // {
          StateDirectory = "registry";
          ExecStart = "${lib.getExe pkgs.distribution} serve ${pkgs.writeText "registry.yml" (builtins.toJSON {
            version = "0.1";
            storage = { filesystem.rootdirectory = "/var/lib/registry"; delete.enabled = true; };
            http.addr = "${cfg.bindToIp}:${toString cfg.port}";
          })}";
        };
      };

      nix-cache = lib.mkIf (cfg.cacheKeySecretName != null) {
        description = "binary cache of this machine's Nix store";
        wantedBy = [ "multi-user.target" ];
        wants = [ "flannel.service" ];
        requires = [ "nix-daemon.socket" ];
        after = [ "network.target" "flannel.service" ];
        script = ''
          export SIGN_KEY_PATHS="$CREDENTIALS_DIRECTORY/${cfg.cacheKeySecretName}"
          exec ${lib.getExe pkgs.harmonia}
        '';
        environment.CONFIG_FILE = pkgs.writeText "harmonia.toml" ''bind = "${cfg.bindToIp}:${toString cfg.cachePort}"'';
        serviceConfig = sandbox;
      };
    };
  };
}
