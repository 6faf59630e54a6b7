# services.nix-infra-agent.tokenFile: an image that becomes a node at its first boot, by a token that it finds there.
{ config, lib, ... }:
let
  cfg = config.services.nix-infra-agent;
in
{
  options.services.nix-infra-agent.tokenFile = lib.mkOption {
    type = lib.types.nullOr (lib.types.strMatching "/[A-Za-z0-9._/-]+"); # a word of the unit's, as it is
    default = null;
    example = "/run/nix-infra/token";
    description = ''
      Where a machine that is no node yet looks for a token of `nix-infra enroll --token`, once at its boot, after cloud-init
      has written its files. The file is secret: it belongs on a tmpfs, for root alone, where `enroll --token --cloud-init` has
      it put.
    '';
  };

  config = lib.mkIf (cfg.enable && cfg.tokenFile != null) {
    assertions = [{
      assertion = !lib.hasPrefix builtins.storeDir cfg.tokenFile;
      message = "services.nix-infra-agent.tokenFile is in the Nix store, where everybody can read it: name a file that is written at boot, such as /run/nix-infra/token.";
    }];

    systemd.services.nix-infra-agent-join = {
      description = "nix-infra agent: become a node by a token";
      wantedBy = [ "multi-user.target" ];
      after = [ "network.target" "dbus.service" "cloud-init.service" "cloud-config.service" ];
      unitConfig.ConditionPathExists = [ cfg.tokenFile "!/var/lib/nix-infra-agent/enrolment.json" ];
      startLimitIntervalSec = 0;
      # The same as the agent's, which it starts.
      environment.PATH = lib.mkForce config.systemd.services.nix-infra-agent.environment.PATH;
      serviceConfig = {
        Type = "oneshot";
        ExecStart = "${cfg.package}/bin/nix-infra-agent join ${cfg.tokenFile}";
        # 2: the token was refused, which it stays. All else may go better later.
        Restart = "on-failure";
        RestartSec = 30;
        RestartPreventExitStatus = 2;
        StateDirectory = "nix-infra-agent";
        StateDirectoryMode = "0700";
      };
    };
  };
}
