# services.nix-infra-controller: the broker of a fleet and its desired state. docs/nixos.md tells how to use it.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  t = import ./types.nix lib;
  cfg = config.services.nix-infra-controller;
  name = "nix-infra-controller";
  dir = "/var/lib/${name}";
  format = pkgs.formats.yaml { };

  listens = default: description: mkOption { type = types.either (types.enum [ "" ]) (t.address false); inherit default description; };

  # What the broker listens on; one that is elsewhere listens there.
  listening = lib.optionals (cfg.settings.broker.external == [ ])
    (lib.filter (a: a != "") [ cfg.settings.broker.listen cfg.settings.broker.websocket ]);
  portOf = address: lib.toIntBase10 (lib.last (lib.splitString ":" address));
  ports = lib.filter (port: port != 0) (map portOf listening);

  # The files of an external etcd may be root's alone: systemd hands them over.
  etcd = cfg.settings.etcd.external;
  files = lib.filterAttrs (_: path: path != null) { inherit (etcd) ca cert key; };
  handedOver = lib.mapAttrs (file: _: "/run/credentials/${name}.service/etcd-${file}") files;

  settings = t.said (lib.recursiveUpdate cfg.settings { etcd.external = handedOver; });
in
{
  imports = [ ./apparmor.nix ];

  options.services.nix-infra-controller = {
    enable = lib.mkEnableOption ''
      the controller of nix-infra, which carries the messages of a fleet and keeps its desired state. Its name, its keys and whom
      it trusts are no options: they come with its enrolment and lie in ${dir}'';

    package = mkOption {
      type = types.package;
      default = pkgs.nix-infra-controller or (pkgs.callPackage ./package.nix { program = name; });
      defaultText = lib.literalExpression "pkgs.nix-infra-controller, or the one of this source tree";
      description = "The package that has `bin/nix-infra-controller`.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Whether the firewall lets nodes and people in, at the ports of `settings.broker`: 4222 and 443.";
    };

    configFile = t.orNull t.absolute ''
      A `controller.yaml` on the machine that counts in the place of `settings`. A string: a Nix path would be copied into the
      store. Which ports `openFirewall` opens is still said by `settings`. The controller's user has to be able to read the
      files that it names, which it can't below /root.'';

    settings = mkOption {
      description = ''
        What `controller.yaml` has. The controller refuses to start with a field that it does not know. The file is in the
        Nix store, so there is no secret in it; a `controller.yaml` in ${dir} is not read.
      '';
      default = { };
      type = types.submodule {
        freeformType = format.type;
        options = {
          broker = {
            listen = listens "0.0.0.0:4222" "host:port for TLS.";
            websocket = listens "0.0.0.0:443" "host:port for secure WebSockets; empty: none.";
            external = t.list (types.strMatching "(tls|wss)://[^[:space:]]+") "URLs of another broker; none is started then.";
            max_connections = t.orNull types.ints.positive "How many connections there may be: 65536 without it.";
          };
          etcd.external = {
            endpoints = t.list (types.strMatching "https?://[^[:space:]]+") "URLs of an etcd that somebody else runs; none: the embedded one.";
            ca = t.orNull t.absolute "File with the CA of that etcd, PEM. Root has to be able to read it, as the next two.";
            cert = t.orNull t.absolute "File with the controller's certificate, PEM.";
            key = t.orNull t.absolute "File with its key, PEM.";
          };
          heartbeat.interval = mkOption {
            type = types.ints.between 1 3600;
            default = 10;
            description = "Seconds between the beats of nodes that don't say when their next one is due.";
          };
          blobs.max_bytes = t.orNull types.ints.positive "Bytes of all that was uploaded together, compressed: as the disk allows without it.";
        };
      };
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.settings.broker.listen != "" || cfg.settings.broker.external != [ ];
        message = "services.nix-infra-controller.settings.broker.listen is empty: give host:port, such as 0.0.0.0:4222, or broker.external.";
      }
      {
        assertion = files == { } || etcd.endpoints != [ ];
        message = "services.nix-infra-controller.settings.etcd.external has files but no endpoints.";
      }
      {
        assertion = lib.allUnique ports;
        message = "services.nix-infra-controller.settings.broker: listen and websocket have the same port.";
      }
    ];

    networking.firewall.allowedTCPPorts = lib.mkIf cfg.openFirewall ports;

    # request and load, which enrol it, are run by root on this machine.
    environment.systemPackages = [ cfg.package ];

    users.users.${name} = { isSystemUser = true; group = name; home = dir; };
    users.groups.${name} = { };

    systemd.services.${name} = {
      description = "nix-infra controller";
      wantedBy = [ "multi-user.target" ];
      after = [ "network.target" ];
      # A machine that is no controller yet has nothing to run: enrolment starts it.
      unitConfig.ConditionPathExists = "${dir}/enrolment.json";
      startLimitIntervalSec = 0;

      serviceConfig = {
        Type = "notify";
        # Enrolment, which root does, may have left files that are root's.
        ExecStartPre = "+${pkgs.coreutils}/bin/chown --recursive --no-dereference ${name}:${name} ${dir}";
        ExecStart = "${cfg.package}/bin/nix-infra-controller run --dir ${dir} --config ${if cfg.configFile != null then cfg.configFile else format.generate "controller.yaml" settings}";
        Restart = "always";
        RestartSec = 1;
        WatchdogSec = 60;
        LimitNOFILE = 1048576; # one for each node's connection
        User = name;
        Group = name;
        StateDirectory = name;
        StateDirectoryMode = "0700";
        UMask = "0077";
        LoadCredential = lib.mapAttrsToList (file: path: "etcd-${file}:${path}") files;

        # It needs its folder and the network, and ports below 1024.
        AmbientCapabilities = [ "CAP_NET_BIND_SERVICE" ];
        CapabilityBoundingSet = [ "CAP_NET_BIND_SERVICE" ];
        NoNewPrivileges = true;
        ProtectSystem = "strict";
        ProtectHome = true;
        PrivateTmp = true;
        PrivateDevices = true;
        ProtectClock = true;
        ProtectControlGroups = true;
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectKernelModules = true;
        ProtectKernelTunables = true;
        ProtectProc = "invisible"; # not ProcSubset=pid: the length of the queue of new connections is read from /proc/sys
        RestrictAddressFamilies = [ "AF_INET" "AF_INET6" "AF_UNIX" "AF_NETLINK" ]; # netlink: which addresses the machine has
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        LockPersonality = true;
        MemoryDenyWriteExecute = true;
        SystemCallArchitectures = "native";
        SystemCallFilter = [ "@system-service" "~@privileged" ];
        SystemCallErrorNumber = "EPERM";
      };
    };
  };
}
