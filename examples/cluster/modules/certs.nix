# infrastructure.certs: the node's certificate for etcd. It comes as three secrets (the script `certs` makes them), and is in
# /root/certs, on a tmpfs, under the names that actions, the agent's etcdctl and modules of other projects know.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.infrastructure.certs;
  host = config.networking.hostName;
  secret = what: mkOption {
    type = types.str;
    example = "node001.${what}";
    description = "Name of the secret with ${what}.";
  };
in
{
  options.infrastructure.certs = {
    enable = lib.mkEnableOption "the node's certificate for etcd";
    caSecretName = secret "ca";
    certSecretName = secret "cert";
    keySecretName = secret "key";

    # For the units that read them, as systemd's LoadCredential has it: ca, cert and key below $CREDENTIALS_DIRECTORY.
    credentials = mkOption {
      type = types.listOf types.str;
      readOnly = true;
      default = [
        "ca:/root/certs/ca-chain.cert.pem"
        "cert:/root/certs/${host}-client-tls.cert.pem"
        "key:/root/certs/${host}-client-tls.key.pem"
      ];
      description = "What units load them by.";
    };
  };

  config = lib.mkIf cfg.enable {
    nix-infra.secrets = lib.genAttrs [ cfg.caSecretName cfg.certSecretName cfg.keySecretName ] (_: { units = [ "cluster-certs" ]; });

    systemd.services.cluster-certs = {
      description = "the node's certificate for etcd";
      wantedBy = [ "multi-user.target" ];
      before = [ "etcd.service" "flannel.service" "confd.service" "mesh-node.service" ];
      script = ''
        put() { install -m 0400 "$CREDENTIALS_DIRECTORY/$1" "/run/cluster-certs/$2"; }
        put ${cfg.caSecretName} ca-chain.cert.pem
        for use in client peer; do
          put ${cfg.certSecretName} "${host}-$use-tls.cert.pem"
          put ${cfg.keySecretName} "${host}-$use-tls.key.pem"
        done
        # A folder that is there already is somebody else's.
        if [ -L /root/certs ] || [ ! -e /root/certs ]; then ln -sfn /run/cluster-certs /root/certs; fi
      '';
      path = [ pkgs.coreutils ];
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        RuntimeDirectory = "cluster-certs";
        RuntimeDirectoryMode = "0700";
        RuntimeDirectoryPreserve = true;
      };
    };
  };
}
