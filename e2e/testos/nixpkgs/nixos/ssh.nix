# sshd is the node's own, Debian's, and always runs: what is set here goes into its configuration, and the firewall.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.services.openssh;
  option = type: default: mkOption { inherit type default; };
  text = value: if lib.isBool value then (if value then "yes" else "no") else lib.concatStringsSep "," (map toString (lib.toList value));
  lines = lib.optionals (cfg.ports != [ 22 ]) (map (port: "Port ${toString port}") cfg.ports)
    ++ lib.mapAttrsToList (name: value: "${name} ${text value}") (lib.filterAttrs (_: value: value != null) cfg.settings)
    ++ lib.optional (cfg.extraConfig != "") cfg.extraConfig;
  conf = pkgs.writeText "sshd.conf" (lib.concatLines lines);
in
{
  options.services.openssh = {
    enable = option types.bool false;
    openFirewall = option types.bool true;
    ports = option (types.listOf types.port) [ 22 ];
    package = option types.package pkgs.openssh;
    settings = option (types.attrsOf (types.nullOr (with types; oneOf [ bool int str (listOf str) ]))) { };
    extraConfig = option types.lines "";
    startWhenNeeded = option types.bool false;
    allowSFTP = option types.bool true;
    sftpServerExecutable = option types.str "internal-sftp";
    banner = option (types.nullOr types.lines) null;
  } // lib.genAttrs [ "hostKeys" "knownHosts" "listenAddresses" "authorizedKeysFiles" ] (_: option types.anything null);

  config = lib.mkIf cfg.enable {
    networking.firewall.allowedTCPPorts = lib.mkIf cfg.openFirewall cfg.ports;
    environment.etc."ssh/sshd_config.d/nixos.conf" = lib.mkIf (lines != [ ]) { source = conf; };
    systemd.services.sshd-reload = lib.mkIf (lines != [ ]) {
      description = "has sshd read its configuration";
      wantedBy = [ "multi-user.target" ];
      after = [ "ssh.service" ];
      restartTriggers = [ conf ];
      serviceConfig = { Type = "oneshot"; RemainAfterExit = true; ExecStart = "/usr/bin/systemctl try-reload-or-restart ssh.service"; };
    };
  };
}
