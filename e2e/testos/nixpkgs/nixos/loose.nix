# Options that a configuration may set, which mean nothing on a node: its kernel, disks and clock are its host's, and its
# Nix is configured by its image. They take anything, so a mistake below them is not found here.
{ config, lib, pkgs, ... }:
let
  inherit (lib) genAttrs mkOption types;
  option = type: default: mkOption { inherit type default; };
  anything = names: genAttrs names (_: option types.anything { });
in
{
  options = anything [ "documentation" "fileSystems" "hardware" "i18n" "location" "powerManagement" "programs" "swapDevices" "time" "xdg" "zramSwap" ] // {
    boot = anything [
      "blacklistedKernelModules" "consoleLogLevel" "extraModprobeConfig" "extraModulePackages" "growPartition" "initrd" "isContainer" "kernelModules"
      "kernelParams" "loader" "supportedFilesystems" "tmp" "zfs"
    ] // {
      kernelPackages = option types.raw pkgs.linuxPackages;
      kernel.sysctl = option (types.attrsOf (types.nullOr (types.oneOf [ types.bool types.str types.int ]))) { };
    };

    console = option types.anything { };

    virtualisation = anything [ "containers" "docker" "oci-containers" ] // {
      podman = anything [ "autoPrune" "defaultNetwork" ] // lib.genAttrs [ "enable" "dockerCompat" ] (_: option types.bool false) // {
        package = option types.package pkgs.podman;
        extraPackages = option (types.listOf types.package) [ ];
      };
    };

    nix = anything [ "buildMachines" "daemonCPUSchedPolicy" "distributedBuilds" "gc" "nixPath" "optimise" "registry" "channel" "sshServe" ] // {
      enable = option types.bool true;
      package = option types.package pkgs.nix;
      settings = option (types.attrsOf types.anything) { };
      extraOptions = option types.lines "";
    };

    security = anything [ "acme" "audit" "auditd" "doas" "lockKernelModules" "pam" "pki" "polkit" "protectKernelImage" "rtkit" "sudo" "wrappers" ] // {
      apparmor = {
        enable = option types.bool false;
        killUnconfinedConfinables = option types.bool false;
        packages = option (types.listOf types.package) [ ];
        policies = option (types.attrsOf (types.submodule {
          options = {
            state = mkOption { type = types.enum [ "disable" "complain" "enforce" ]; };
            profile = mkOption { type = types.lines; };
            path = option (types.nullOr types.path) null;
          };
        })) { };
      };
    };

    services = anything [
      "chrony" "cloud-init" "dbus" "fail2ban" "fstrim" "getty" "journald" "logind" "logrotate" "nginx" "ntp" "qemuGuest" "resolved" "rsyncd" "timesyncd" "udev"
    ];

    system = {
      stateVersion = option types.str config.system.nixos.release;
      configurationRevision = option (types.nullOr types.str) null;
      nixos = {
        release = option types.str "25.11";
        version = option types.str "${config.system.nixos.release}.testos";
        label = option types.str config.system.nixos.version;
        tags = option (types.listOf types.str) [ ];
      };
      extraDependencies = option (types.listOf types.package) [ ];
    } // anything [ "autoUpgrade" "userActivationScripts" "switch" ];
  };

  config.environment.etc."sysctl.d/60-nixos.conf" = lib.mkIf (config.boot.kernel.sysctl != { }) {
    text = lib.concatLines (lib.mapAttrsToList (name: value: "${name}=${if value == true then "1" else if value == false then "0" else toString value}")
      (lib.filterAttrs (_: value: value != null) config.boot.kernel.sysctl));
  };
}
