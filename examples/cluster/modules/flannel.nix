# infrastructure.flannel: the overlay network, WireGuard between all nodes of the cluster. The interface is flannel-wg, and a
# node's address in it that of its subnet; nix-infra fills it in as [%%NODE.overlayIp%%].
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.infrastructure.flannel;
  endpoints = lib.concatMapStringsSep "," (m: "https://${m.ip}:2379") cfg.etcdCluster;
  network = builtins.toJSON {
    Network = cfg.network;
    SubnetLen = 24;
    SubnetMin = cfg.subnetMin;
    SubnetMax = cfg.subnetMax;
    Backend = { Type = "wireguard"; PersistentKeepaliveInterval = 60; };
  };
in
{
  options.infrastructure.flannel = {
    enable = lib.mkEnableOption "the overlay network";

    etcdCluster = mkOption {
      type = types.listOf (types.attrsOf types.str);
      default = [ ];
      example = [ { name = "etcd001"; ip = "192.0.2.1"; } ];
      description = "The members of etcd: their names and addresses.";
    };

    network = mkOption { type = types.str; default = "10.0.0.0/8"; description = "All addresses of the overlay."; };
    subnetMin = mkOption { type = types.str; default = "10.10.0.0"; description = "The first subnet; each node has a /24."; };
    subnetMax = mkOption { type = types.str; default = "10.99.0.0"; description = "The last one."; };
  };

  config = lib.mkIf cfg.enable {
    # br_netfilter: flannel does not start without what it has in /proc/sys.
    boot.kernelModules = [ "wireguard" "br_netfilter" ];
    environment.systemPackages = [ pkgs.wireguard-tools ];
    networking.firewall.allowedUDPPorts = [ 51820 ];

    systemd.services.flannel = {
      description = "overlay network";
      wantedBy = [ "multi-user.target" ];
      wants = [ "cluster-certs.service" ];
      after = [ "network.target" "cluster-certs.service" ];
      partOf = [ "cluster-certs.service" ];
      path = [ pkgs.etcd pkgs.iptables ];
      environment.ETCDCTL_ENDPOINTS = endpoints;
      script = ''
        export ETCDCTL_CACERT=$CREDENTIALS_DIRECTORY/ca ETCDCTL_CERT=$CREDENTIALS_DIRECTORY/cert ETCDCTL_KEY=$CREDENTIALS_DIRECTORY/key
        # All nodes write the same; the first one that reaches etcd begins.
        until etcdctl put /coreos.com/network/config ${lib.escapeShellArg network} >/dev/null; do sleep 2; done
        exec ${pkgs.flannel}/bin/flannel --etcd-endpoints=${endpoints} --etcd-prefix=/coreos.com/network \
          --etcd-cafile="$ETCDCTL_CACERT" --etcd-certfile="$ETCDCTL_CERT" --etcd-keyfile="$ETCDCTL_KEY"
      '';
      serviceConfig = {
        Restart = "always";
        RestartSec = 5;
        RuntimeDirectory = "flannel";
        LoadCredential = config.infrastructure.certs.credentials;
        CapabilityBoundingSet = [ "CAP_NET_ADMIN" "CAP_NET_RAW" ];
        ProtectHome = true;
        ProtectSystem = "full";
        PrivateTmp = true;
      };
    };
  };
}
