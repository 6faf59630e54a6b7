# A node that uses everything, for check.sh.
{
  services.openssh.enable = true;
  services.nix-infra-agent = {
    enable = true;
    closeSSH = true;
    tokenFile = "/run/nix-infra/token";
    policy = {
      files.roots = [ "/var/lib/app/public" ];
      commands = [
        {
          name = "backups";
          program = "restic";
          user = "backup";
          timeout = 600;
          defaults = [ "--no-lock" ];
          options = [
            { names = [ "--no-lock" ]; }
            { names = [ "-r" "--repo" ]; value = "/var/lib/backup/[a-z]+"; }
            { names = [ "--tag" ]; value = "[a-z0-9-]+"; many = true; }
          ];
          forms = [
            { words = [ "snapshots" ]; operands = [ { what = "a snapshot's id"; pattern = "[0-9a-f]{8,64}"; max = 8; } ]; }
            { words = [ "stats" ]; options = [ { names = [ "--mode" ]; value = "restore-size|raw-data"; } ]; }
          ];
          denied = [ { names = [ "--password-command" ]; why = "it runs other programs"; } ];
          env = [ { name = "RESTIC_PASSWORD_FILE"; value = "/run/secrets/{node}"; if_exists = true; } ];
        }
        { name = "queue"; program = "/run/current-system/sw/bin/app-ctl"; role = "viewer"; forms = [ { words = [ "status|queue" ]; } { } ]; }
      ];
      defaultCommands = false;
      allowShell.timeout = 600;
      tunnels = [ { address = "127.0.0.1:5432"; } { address = "[fd00::7]:*"; role = "deployer"; } { address = "db.internal:5432"; } ];
      uploads.roots = [ { path = "/var/lib/app/import"; } { path = "/root/uploads"; role = "admin"; } ];
      actions = { memory = 2147483648; timeout = 7200; };
    };
    healthChecks = [
      { name = "web"; kind = "http"; url = "http://127.0.0.1:8080/ping"; status = 200; body = "pong"; grace = 60; }
      { name = "db"; kind = "tcp"; address = "127.0.0.1:5432"; interval = 0.5; }
      { name = "app"; kind = "unit"; unit = "app.service"; }
      { name = "migrated"; kind = "command"; command = [ "/run/current-system/sw/bin/pg_isready" "--quiet" ]; timeout = 10; }
      { name = "ready"; kind = "file"; path = "/run/app/ready"; contains = "ok"; }
    ];
  };
  security.apparmor.enable = true;
  services.nix-infra-controller = {
    enable = true;
    appArmor = "enforce";
    openFirewall = true;
    settings = {
      broker.websocket = "[::]:8443";
      etcd.external = { endpoints = [ "https://10.0.0.2:2379" ]; ca = "/root/certs/ca.pem"; cert = "/root/certs/ctl.pem"; key = "/root/certs/ctl.key"; };
      heartbeat.interval = 20;
    };
  };
  nix-infra.secrets."db.password".units = [ "app" "worker.service" ];
  nix-infra.secrets.token.units = [ "app" ];
  nix-infra.secrets.seed.units = [ "job@1" ];
  systemd.services.worker.serviceConfig.ExecStart = "/run/current-system/sw/bin/worker";
  systemd.services.app = { script = "app --password-file \"$CREDENTIALS_DIRECTORY/db.password\""; };
}
