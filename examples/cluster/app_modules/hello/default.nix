# infrastructure.hello: a small web server that answers with a secret message, and is in the mesh. It shows what an app module
# has: options, a unit in a sandbox, a secret that is read from a file, a health check, and its place in the mesh.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.infrastructure.hello;
  host = if cfg.bindToIp == "0.0.0.0" then "127.0.0.1" else cfg.bindToIp;
  url = "http://${host}:${toString cfg.bindToPort}/";
in
{
  options.infrastructure.hello = {
    enable = lib.mkEnableOption "a web server that says hello";

    bindToIp = mkOption {
      type = types.str;
      default = "0.0.0.0";
      description = "IPv4 address that it listens on. Only the overlay network is let in.";
    };

    bindToPort = mkOption {
      type = types.port;
      default = 8080;
      description = "TCP port that it listens on.";
    };

    messageSecretName = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "hello.message";
      description = "Name of the secret that it answers with; null: it says which node it is.";
    };
  };

  config = lib.mkIf cfg.enable {
    infrastructure.mesh.services.hello = { bindToIp = if cfg.bindToIp == "0.0.0.0" then null else cfg.bindToIp; port = cfg.bindToPort; group = "backends"; envPrefix = "HELLO_"; };

    # The unit loads the secret as a credential, and is restarted when it gets another value.
    nix-infra.secrets = lib.mkIf (cfg.messageSecretName != null) { ${cfg.messageSecretName}.units = [ "hello" ]; };

    # A deployment is taken back where this does not pass.
    services.nix-infra-agent.healthChecks = [ { name = "hello"; kind = "http"; inherit url; status = 200; } ];

    # nix-infra port-forward NODE 8080:HOST:8080, for operators.
    services.nix-infra-agent.policy.tunnels = [ { address = "${host}:${toString cfg.bindToPort}"; role = "operator"; } ];

    systemd.services.hello = {
      description = "says hello";
      wantedBy = [ "multi-user.target" ];
      after = [ "network.target" ];
      environment.HELLO_URL = url; # for action.sh
      # The message is on a tmpfs that nobody else reads, and in no argument.
      script =
        (if cfg.messageSecretName != null
        then ''cp "$CREDENTIALS_DIRECTORY/${cfg.messageSecretName}" "$RUNTIME_DIRECTORY/index.html"''
        else ''echo "hello from ${config.networking.hostName}" > "$RUNTIME_DIRECTORY/index.html"'')
        + ''

          chmod 0400 "$RUNTIME_DIRECTORY/index.html"
          exec ${pkgs.busybox}/bin/busybox httpd -f -p ${cfg.bindToIp}:${toString cfg.bindToPort} -h "$RUNTIME_DIRECTORY"
        '';
      serviceConfig = {
        Restart = "on-failure";
        RestartSec = 1;
        RuntimeDirectory = "hello";
        RuntimeDirectoryMode = "0700";
        UMask = "0077";

        # It needs its folder and its port.
        DynamicUser = true;
        CapabilityBoundingSet = "";
        ProtectHome = true;
        PrivateDevices = true;
        ProtectClock = true;
        ProtectControlGroups = true;
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectKernelModules = true;
        ProtectKernelTunables = true;
        ProtectProc = "invisible";
        RestrictAddressFamilies = [ "AF_INET" "AF_INET6" ];
        RestrictNamespaces = true;
        RestrictRealtime = true;
        LockPersonality = true;
        MemoryDenyWriteExecute = true;
        SystemCallArchitectures = "native";
        SystemCallFilter = [ "@system-service" "~@privileged" ];
        SystemCallErrorNumber = "EPERM";
      };
    };
  };
}
