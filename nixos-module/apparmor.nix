# services.nix-infra-controller.appArmor: a profile of what the controller may open, beside the sandbox of its unit. Where the
# machine has no AppArmor it means nothing. The agent has none: it runs activations, which change whatever a system
# has, so that a profile of it would allow everything and only look like a limit.
{ config, lib, ... }:
let
  cfg = config.services.nix-infra-controller;
  name = "nix-infra-controller";
  dir = "/var/lib/${name}";
in
{
  options.services.nix-infra-controller.appArmor = lib.mkOption {
    type = lib.types.enum [ "disable" "complain" "enforce" ];
    default = "complain";
    description = ''
      What AppArmor does where the controller does what its profile does not say, if `security.apparmor.enable` is set:
      `complain` lets it, and writes it to the journal; `enforce` refuses it. `disable`: there is no profile.
    '';
  };

  config = lib.mkIf (cfg.enable && config.security.apparmor.enable && cfg.appArmor != "disable") {
    security.apparmor.policies.${name} = {
      state = cfg.appArmor;
      # By name, not by the program's path: `request` and `load`, which root calls, read and write where root says.
      profile = ''
        profile ${name} flags=(attach_disconnected) {
          capability net_bind_service,
          network inet stream,
          network inet6 stream,
          network inet dgram,
          network inet6 dgram,
          network netlink raw,
          network unix dgram,
          unix (create, send, connect) type=dgram,
          signal (receive),

          ${builtins.storeDir}/** r,
          ${cfg.package}/bin/${name} mr,
          ${dir}/ r,
          ${dir}/** rwkl,
          ${lib.optionalString (cfg.configFile != null) "\"${cfg.configFile}\" r,"}
          /run/credentials/${name}.service/{,**} r,
          /run/systemd/notify w,
          /tmp/{,**} rwk,

          # Names and addresses of other machines, the time zone, and authorities of an external broker.
          /etc/{hosts,resolv.conf,nsswitch.conf,services,localtime} r,
          /etc/{ssl,static,zoneinfo}/{,**} r,
          /run/{,systemd/}resolve/** r,

          # What Go and the broker ask the kernel for.
          /proc/ r,
          /proc/*/{cgroup,fd/,maps,mountinfo,stat,status} r,
          /proc/sys/net/core/somaxconn r,
          /proc/{meminfo,stat,uptime} r,
          /sys/kernel/mm/transparent_hugepage/hpage_pmd_size r,
          /sys/fs/cgroup/{,**} r,
          /dev/{null,urandom} rw,
        }
      '';
    };

    systemd.services.${name} = {
      after = [ "apparmor.service" ];
      # Where nothing is refused, a profile that can't be loaded keeps nothing from starting.
      serviceConfig.AppArmorProfile = lib.optionalString (cfg.appArmor == "complain") "-" + name;
    };
  };
}
