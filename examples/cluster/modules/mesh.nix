# infrastructure.mesh: the service mesh. What runs on a node is registered in etcd while it answers; confd turns what is
# registered into the configuration of HAProxy, which on every node listens on 127.0.0.1 for the apps of the groups that the
# node subscribes to.
#
#   /cluster/nodes/NODE                        name, ipv4, services: the groups that it subscribes to, for people to look at
#   /cluster/GROUP/APP/meta_data               the port, and the variables that clients may want
#   /cluster/GROUP/APP/instances/NODE          where one instance is; gone when its unit stops, or its node
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.infrastructure.mesh;
  host = config.networking.hostName;
  endpoints = map (m: "https://${m.ip}:2379") cfg.etcdCluster;
  credentials = config.infrastructure.certs.credentials;
  haproxyConfig = "/run/mesh/haproxy.cfg"; # not in /etc, where each activation would put back what it knows

  # What every unit needs that speaks to etcd.
  etcdctl = {
    path = [ pkgs.etcd pkgs.coreutils pkgs.gnused pkgs.iproute2 ];
    environment.ETCDCTL_ENDPOINTS = lib.concatStringsSep "," endpoints;
    wants = [ "cluster-certs.service" ];
    after = [ "network.target" "cluster-certs.service" ];
  };
  sandbox = {
    DynamicUser = true;
    LoadCredential = credentials;
    CapabilityBoundingSet = "";
    ProtectHome = true;
    PrivateDevices = true;
    RestrictAddressFamilies = [ "AF_INET" "AF_INET6" "AF_NETLINK" ];
  };
  login = ''export ETCDCTL_CACERT=$CREDENTIALS_DIRECTORY/ca ETCDCTL_CERT=$CREDENTIALS_DIRECTORY/cert ETCDCTL_KEY=$CREDENTIALS_DIRECTORY/key'';

  base = ''
    global
      maxconn 4096
    defaults
      mode tcp
      timeout connect 5s
      timeout client 50s
      timeout server 50s
    # So that there is something to listen on before anything is registered.
    frontend health
      mode http
      bind 127.0.0.1:8404
      http-request return status 200
  '';

  # Every node may write to etcd, and none may write lines of another one's configuration: what is text is one line, and
  # ports are numbers, or HAProxy's check refuses it all and what was there stays.
  template = pkgs.writeText "haproxy.cfg.tmpl" (base + lib.concatMapStrings (group: ''
    {{- range $app := lsdir "/cluster/${group}" }}
    {{- $key := printf "/cluster/${group}/%s" $app }}
    {{- if exists (printf "%s/meta_data" $key) }}
    {{- $meta := json (getv (printf "%s/meta_data" $key)) }}
    listen tcp-in-${group}-{{ replace $app "\n" " " -1 }}
      bind 127.0.0.1:{{ printf "%.0f" $meta.publish.port }}
      balance roundrobin
      {{- range gets (printf "%s/instances/*" $key) }}
      {{- $instance := json .Value }}
      server {{ replace $instance.node "\n" " " -1 }} {{ replace $instance.ipv4 "\n" " " -1 }}:{{ printf "%.0f" $instance.port }} check
      {{- end }}
    {{- end }}
    {{- end }}
  '') cfg.subscribe);
  reload = pkgs.writeShellScript "reload-mesh" "exec ${pkgs.systemd}/bin/systemctl reload-or-restart mesh-haproxy.service";
  confd = pkgs.linkFarm "confd" [
    { name = "templates/haproxy.cfg.tmpl"; path = template; }
    {
      name = "conf.d/haproxy.toml";
      path = pkgs.writeText "haproxy.toml" ''
        [template]
        src = "haproxy.cfg.tmpl"
        dest = "${haproxyConfig}"
        mode = "0644"
        keys = [ "/cluster/frontends", "/cluster/backends", "/cluster/services" ]
        check_cmd = "${pkgs.haproxy}/bin/haproxy -c -f {{.src}}"
        reload_cmd = "${reload}"
      '';
    }
  ];

  service = types.submodule ({ name, ... }: {
    options = {
      unit = mkOption { type = types.str; default = name; description = "The systemd service that it is, without .service."; };
      group = mkOption { type = types.enum [ "frontends" "backends" "services" ]; default = "backends"; description = "The group it belongs to."; };
      bindToIp = mkOption { type = types.nullOr types.str; default = null; description = "Where the other nodes reach it; null: the node's overlay address, as it is when the service starts."; };
      port = mkOption { type = types.port; description = "The port it listens on, and is found at on 127.0.0.1 of every node that subscribes."; };
      auxPorts = mkOption { type = types.listOf types.port; default = [ ]; description = "Further ports that the other nodes may reach."; };
      protocol = mkOption { type = types.str; default = "http"; description = "What clients are told that it speaks."; };
      path = mkOption { type = types.str; default = ""; description = "What clients are told to ask for."; };
      envPrefix = mkOption { type = types.str; default = ""; description = "What the names of clients' variables begin with."; };
    };
  });

  # Registers a service while it runs and answers: a lease in etcd is kept alive, and all goes with it.
  register = name: s:
    let
      key = "/cluster/${s.group}/${name}";
      meta = builtins.toJSON {
        publish.port = s.port;
        env_prefix = s.envPrefix;
        env = { PROTOCOL = s.protocol; HOST = "127.0.0.1"; PORT = toString s.port; PATH = s.path; };
      };
    in
    etcdctl // {
      description = "registers ${name} in the mesh";
      wantedBy = [ "${s.unit}.service" ];
      bindsTo = [ "${s.unit}.service" ];
      after = etcdctl.after ++ [ "${s.unit}.service" ];
      script = ''
        ${login}
        address() { ${if s.bindToIp != null then "echo ${s.bindToIp}" else "ip -4 -o address show dev flannel-wg 2>/dev/null | sed -n 's/.* inet \\([0-9.]*\\).*/\\1/p'"}; }
        until ip=$(address); [ -n "$ip" ] && (exec 3<>"/dev/tcp/$ip/${toString s.port}") 2>/dev/null; do sleep 1; done
        etcdctl put ${key}/meta_data ${lib.escapeShellArg meta} >/dev/null
        lease=$(etcdctl lease grant 30 | cut -d ' ' -f 2)
        trap 'etcdctl lease revoke "$lease" >/dev/null; exit' TERM
        etcdctl put --lease="$lease" ${key}/instances/${host} '{"node":"${host}","ipv4":"'"$ip"'","port":${toString s.port}}' >/dev/null
        etcdctl lease keep-alive "$lease" >/dev/null & wait $!
      '';
      serviceConfig = sandbox // { Restart = "always"; RestartSec = 5; KillMode = "mixed"; };
    };
in
{
  options.infrastructure.mesh = {
    enable = lib.mkEnableOption "the service mesh";

    etcdCluster = mkOption {
      type = types.listOf (types.attrsOf types.str);
      default = [ ];
      example = [ { name = "etcd001"; ip = "192.0.2.1"; } ];
      description = "The members of etcd: their names and addresses.";
    };

    ipv4 = mkOption { type = types.str; default = ""; description = "The node's address, as it is registered."; };

    subscribe = mkOption {
      type = types.listOf (types.enum [ "frontends" "backends" "services" ]);
      default = [ ];
      description = "Groups whose apps this node reaches on 127.0.0.1.";
    };

    services = mkOption {
      type = types.attrsOf service;
      default = { };
      example.shop = { port = 8080; group = "frontends"; };
      description = "What of this node is in the mesh, by app.";
    };
  };

  config = lib.mkIf cfg.enable {
    networking.firewall.interfaces.flannel-wg.allowedTCPPorts = lib.concatMap (s: [ s.port ] ++ s.auxPorts) (lib.attrValues cfg.services);

    systemd.services = lib.mapAttrs' (name: s: lib.nameValuePair "mesh-${name}" (register name s)) cfg.services // {
      mesh-node = etcdctl // {
        description = "registers this node in the mesh";
        wantedBy = [ "multi-user.target" ];
        script = ''
          ${login}
          until etcdctl put /cluster/nodes/${host} ${lib.escapeShellArg (builtins.toJSON { name = host; inherit (cfg) ipv4; services = cfg.subscribe; })} >/dev/null; do sleep 2; done
          exec sleep infinity
        '';
        serviceConfig = sandbox // { Restart = "always"; RestartSec = 5; };
      };

      confd = etcdctl // {
        description = "configures the mesh by what is registered";
        wantedBy = [ "multi-user.target" ];
        after = etcdctl.after ++ [ "mesh-haproxy.service" ];
        # It writes where HAProxy reads, and reloads it.
        script = ''
          exec ${pkgs.confd}/bin/confd -confdir ${confd} -backend etcdv3 -watch -interval 10 -log-level warn \
            ${lib.concatMapStringsSep " " (e: "-node ${e}") endpoints} \
            -client-ca-keys "$CREDENTIALS_DIRECTORY/ca" -client-cert "$CREDENTIALS_DIRECTORY/cert" -client-key "$CREDENTIALS_DIRECTORY/key"
        '';
        serviceConfig = {
          Restart = "always";
          RestartSec = 5;
          LoadCredential = credentials;
          ProtectHome = true;
          ProtectSystem = "strict";
          ReadWritePaths = [ "/run/mesh" ];
          PrivateTmp = true;
        };
      };

      mesh-haproxy = {
        description = "listens for the apps of the mesh";
        wantedBy = [ "multi-user.target" ];
        after = [ "network.target" ];
        preStart = "[ -e ${haproxyConfig} ] || cp --no-preserve=mode ${pkgs.writeText "haproxy.cfg" base} ${haproxyConfig}";
        serviceConfig = {
          Type = "notify";
          ExecStart = "${pkgs.haproxy}/bin/haproxy -Ws -f ${haproxyConfig}";
          ExecReload = [ "${pkgs.haproxy}/bin/haproxy -c -f ${haproxyConfig}" "${pkgs.coreutils}/bin/kill -USR2 $MAINPID" ];
          KillMode = "mixed";
          SuccessExitStatus = 143; # what the master ends with when it is told to
          Restart = "always";
          RestartSec = 5;
          RuntimeDirectory = "mesh";
          RuntimeDirectoryPreserve = true;
          User = "haproxy";
          Group = "haproxy";
          AmbientCapabilities = [ "CAP_NET_BIND_SERVICE" ]; # an app may have a port below 1024
          CapabilityBoundingSet = [ "CAP_NET_BIND_SERVICE" ];
          NoNewPrivileges = true;
          ProtectHome = true;
          ProtectSystem = "strict";
          PrivateDevices = true;
        };
      };
    };

    users.users.haproxy = { isSystemUser = true; group = "haproxy"; };
    users.groups.haproxy = { };
  };
}
