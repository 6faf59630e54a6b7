# infrastructure.etcd: a member of the cluster's etcd. Its data stays when it is taken away.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.infrastructure.etcd;
  host = config.networking.hostName;
  own = lib.findFirst (m: m.name == host) null cfg.initialCluster;
in
{
  options.infrastructure.etcd = {
    enable = lib.mkEnableOption "a member of etcd";

    initialCluster = mkOption {
      type = types.listOf (types.attrsOf types.str);
      default = [ ];
      example = [ { name = "etcd001"; ip = "192.0.2.1"; } ];
      description = "All members: their names and addresses.";
    };

    initialClusterToken = mkOption { type = types.str; description = "Tells this cluster from others."; };

    initialClusterState = mkOption {
      type = types.enum [ "new" "existing" ];
      default = "new";
      description = "`existing` for a member that joins later, after `etcdctl member add`.";
    };

    address = mkOption {
      type = types.str;
      default = if own == null then "" else own.ip;
      defaultText = lib.literalExpression "that of this node in initialCluster";
      description = "IPv4 address by which the other nodes reach it.";
    };

    clientAddresses = mkOption {
      type = types.listOf types.str;
      default = [ ];
      description = "Who may connect, as IPv4 addresses or networks. Without any, everybody may, who then needs a certificate.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [ {
      assertion = own != null;
      message = "infrastructure.etcd: ${host} is not in initialCluster (${lib.concatMapStringsSep ", " (m: m.name) cfg.initialCluster}).";
    } ];

    environment.systemPackages = [ pkgs.etcd ]; # etcdctl

    networking.firewall.allowedTCPPorts = lib.mkIf (cfg.clientAddresses == [ ]) [ 2379 2380 ];
    networking.firewall.extraInputRules = lib.mkIf (cfg.clientAddresses != [ ])
      "ip saddr { ${lib.concatStringsSep ", " cfg.clientAddresses} } tcp dport { 2379, 2380 } accept";
    networking.nftables.enable = lib.mkIf (cfg.clientAddresses != [ ]) true;

    services.nix-infra-agent.healthChecks = [ { name = "etcd"; kind = "unit"; unit = "etcd.service"; grace = 60; } ];

    users.users.etcd = { isSystemUser = true; group = "etcd"; };
    users.groups.etcd = { };

    systemd.services.etcd = {
      description = "etcd";
      wantedBy = [ "multi-user.target" ];
      wants = [ "cluster-certs.service" ];
      after = [ "network.target" "cluster-certs.service" ];
      partOf = [ "cluster-certs.service" ];
      environment = {
        ETCD_NAME = host;
        ETCD_DATA_DIR = "/var/lib/etcd";
        ETCD_LISTEN_CLIENT_URLS = "https://0.0.0.0:2379,https://127.0.0.1:4001";
        ETCD_LISTEN_PEER_URLS = "https://0.0.0.0:2380";
        ETCD_ADVERTISE_CLIENT_URLS = "https://${cfg.address}:2379";
        ETCD_INITIAL_ADVERTISE_PEER_URLS = "https://${cfg.address}:2380";
        ETCD_INITIAL_CLUSTER = lib.concatMapStringsSep "," (m: "${m.name}=https://${m.ip}:2380") cfg.initialCluster;
        ETCD_INITIAL_CLUSTER_STATE = cfg.initialClusterState;
        ETCD_INITIAL_CLUSTER_TOKEN = cfg.initialClusterToken;
        ETCD_CLIENT_CERT_AUTH = "true";
        ETCD_PEER_CLIENT_CERT_AUTH = "true";
      };
      # Credentials are read from files that only this unit sees; in the environment are no more than their paths.
      script = ''
        for kind in "" PEER_; do
          export "ETCD_''${kind}TRUSTED_CA_FILE=$CREDENTIALS_DIRECTORY/ca"
          export "ETCD_''${kind}CERT_FILE=$CREDENTIALS_DIRECTORY/cert"
          export "ETCD_''${kind}KEY_FILE=$CREDENTIALS_DIRECTORY/key"
        done
        exec ${pkgs.etcd}/bin/etcd
      '';
      serviceConfig = {
        Type = "notify";
        NotifyAccess = "all";
        Restart = "always";
        RestartSec = 5;
        LimitNOFILE = 65536;
        # A user that stays: the data may be older than this unit, or on a disk of its own.
        User = "etcd";
        Group = "etcd";
        StateDirectory = "etcd";
        StateDirectoryMode = "0700";
        LoadCredential = config.infrastructure.certs.credentials;
        CapabilityBoundingSet = "";
        NoNewPrivileges = true;
        ProtectSystem = "strict";
        PrivateTmp = true;
        ProtectHome = true;
        PrivateDevices = true;
        RestrictAddressFamilies = [ "AF_INET" "AF_INET6" "AF_UNIX" ];
        SystemCallFilter = [ "@system-service" "~@privileged" ];
        SystemCallErrorNumber = "EPERM";
      };
    };
  };
}
