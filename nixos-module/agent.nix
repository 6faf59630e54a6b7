# services.nix-infra-agent: the agent of a node. Start here; policy.nix and health.nix have what the node allows and what
# has to work on it. docs/nixos.md tells how to use it.
{ config, lib, pkgs, ... }:
let
  cfg = config.services.nix-infra-agent;
  dir = "/var/lib/nix-infra-agent";

  # Where the programs that the agent runs are (nix, systemctl, systemd-creds): those of the running system, as with the
  # unit that enrolment installs. Store paths would restart the agent with each update of any of them.
  searchPath = "/run/wrappers/bin:/run/current-system/sw/bin";

  firewall = config.networking.firewall;
  sshPorts = config.services.openssh.ports;
  openRange = range: lib.any (port: range.from <= port && port <= range.to) sshPorts;
in
{
  imports = [ ./policy.nix ./health.nix ./join.nix ];

  options.services.nix-infra-agent = {
    enable = lib.mkEnableOption ''
      the agent of nix-infra, which brings this machine to the state that its operator signed. Who the machine is and
      which controllers it connects to is no option: that comes with its enrolment and lies in ${dir}'';

    package = lib.mkOption {
      type = lib.types.package;
      default = pkgs.nix-infra-agent or (pkgs.callPackage ./package.nix { program = "nix-infra-agent"; });
      defaultText = lib.literalExpression "pkgs.nix-infra-agent, or the one of this source tree";
      description = "The package that has `bin/nix-infra-agent`.";
    };

    closeSSH = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = ''
        Whether sshd's ports are closed to the network. sshd itself stays: `nix-infra ssh` reaches it through the agent.
        Another module that opens one of its ports is an error. What `networking.firewall.interfaces` and
        `trustedInterfaces` open for one interface, such as a VPN's, stays open.
      '';
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = config.nix.enable;
        message = "services.nix-infra-agent needs Nix on the machine, which builds and keeps its systems: set nix.enable = true.";
      }
      {
        assertion = lib.versionAtLeast config.systemd.package.version "250";
        message = "services.nix-infra-agent needs systemd 250 or newer, for encrypted credentials; this is ${config.systemd.package.version}.";
      }
      {
        assertion = cfg.closeSSH -> firewall.enable;
        message = "services.nix-infra-agent.closeSSH closes nothing without the firewall: set networking.firewall.enable = true.";
      }
      {
        assertion = cfg.closeSSH -> !lib.any (port: lib.elem port sshPorts) firewall.allowedTCPPorts && !lib.any openRange firewall.allowedTCPPortRanges;
        message = "services.nix-infra-agent.closeSSH is set, but networking.firewall opens a port of sshd (${lib.concatMapStringsSep ", " toString sshPorts}): "
          + "take it out of allowedTCPPorts and allowedTCPPortRanges, or unset closeSSH.";
      }
    ];

    services.openssh.openFirewall = lib.mkIf cfg.closeSSH false;

    # For root at the machine, when no controller can be reached: status, rollback, apply.
    environment.systemPackages = [ cfg.package ];

    systemd.services.nix-infra-agent = {
      description = "nix-infra agent";
      wantedBy = [ "multi-user.target" ];
      # Never network-online.target: a node without a network must still be able to go back.
      after = [ "dbus.service" "nix-daemon.socket" ];
      # A machine that is no node yet has nothing to run: enrolment starts it.
      unitConfig.ConditionPathExists = "${dir}/enrolment.json";
      # It is never given up: while it is gone, the machine can't be reached.
      startLimitIntervalSec = 0;

      # A changed unit is restarted within the activation, which is a unit of its own and outlives that: the agent that a
      # system brings has to prove it. It is not stopped before the activation, so that there is an agent all the while.
      restartIfChanged = true;
      stopIfChanged = false;

      environment.PATH = lib.mkForce searchPath;

      # There is no sandbox. Nix builds in this unit, as root, and makes its own sandboxes, which most of systemd's settings
      # would break; and who can have systemd start anything, as the agent has to, is not held by limits of one unit.
      serviceConfig = {
        Type = "notify";
        ExecStart = "${cfg.package}/bin/nix-infra-agent run";
        Restart = "always";
        RestartSec = 1;
        WatchdogSec = 60;
        KillMode = "mixed";
        TimeoutStopSec = 10;
        OOMScoreAdjust = -500;
        LimitNOFILE = 65536;
        StateDirectory = "nix-infra-agent";
        StateDirectoryMode = "0700";
      };
    };
  };
}
