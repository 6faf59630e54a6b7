# The firewall, which is what NixOS's does as an nft ruleset: what is not allowed in is dropped. Names and addresses of a
# node are its host's affair, so the rest is taken and means nothing.
{ config, lib, ... }:
let
  inherit (lib) mkOption optionalString types;
  cfg = config.networking.firewall;
  option = type: default: mkOption { inherit type default; };
  loose = option types.anything { };

  range = types.submodule { options = { from = mkOption { type = types.port; }; to = mkOption { type = types.port; }; }; };
  ports = {
    allowedTCPPorts = option (types.listOf types.port) [ ];
    allowedUDPPorts = option (types.listOf types.port) [ ];
    allowedTCPPortRanges = option (types.listOf range) [ ];
    allowedUDPPortRanges = option (types.listOf range) [ ];
  };

  accept = what: protocol: single: ranges:
    let set = lib.unique (map toString single ++ map (r: "${toString r.from}-${toString r.to}") ranges); in
    optionalString (set != [ ]) "    ${what}${protocol} dport { ${lib.concatStringsSep ", " set} } accept\n";
  opened = what: p: accept what "tcp" p.allowedTCPPorts p.allowedTCPPortRanges + accept what "udp" p.allowedUDPPorts p.allowedUDPPortRanges;

  ruleset = ''
    table inet nixos-fw {
      chain input {
        type filter hook input priority filter; policy drop;
    ${lib.concatMapStrings (name: "    iifname \"${name}\" accept\n") cfg.trustedInterfaces}
        ct state { established, related } accept
        ct state invalid drop
    ${opened "" cfg}${lib.concatStrings (lib.mapAttrsToList (name: opened "iifname \"${name}\" ") cfg.interfaces)}
    ${optionalString cfg.allowPing "    icmp type echo-request accept"}
        icmpv6 type { echo-request, nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } accept
    ${cfg.extraInputRules}
        ${optionalString cfg.rejectPackets "reject"}
      }
    }
  '';
in
{
  options.networking = {
    hostName = option (types.strMatching "^$|^[[:alnum:]]([[:alnum:]_-]{0,61}[[:alnum:]])?$") "nixos";
    domain = option (types.nullOr types.str) null;
    fqdn = option types.str config.networking.hostName;
    hostId = option (types.nullOr types.str) null;
    enableIPv6 = option types.bool true;
    useDHCP = option types.bool true;
    dhcpcd.enable = option types.bool true;
    useNetworkd = option types.bool false;
    usePredictableInterfaceNames = option types.bool true;
    useHostResolvConf = option types.bool false;
    nameservers = option (types.listOf types.str) [ ];
    extraHosts = option types.lines "";
    hosts = option (types.attrsOf (types.listOf types.str)) { };
    defaultGateway = option types.anything null;
    defaultGateway6 = option types.anything null;
    nftables.enable = option types.bool false;
    nftables.ruleset = option types.lines "";

    firewall = ports // {
      enable = option types.bool true;
      interfaces = option (types.attrsOf (types.submodule { options = ports; })) { };
      trustedInterfaces = option (types.listOf types.str) [ ];
      allowPing = option types.bool true;
      rejectPackets = option types.bool false;
      extraInputRules = option types.lines "";
    } // lib.genAttrs [ "logRefusedConnections" "logRefusedPackets" "logReversePathDrops" "checkReversePath" ] (_: option (types.either types.bool types.str) false);
  } // lib.genAttrs [ "interfaces" "bridges" "vlans" "bonds" "wireguard" "nat" "networkmanager" "timeServers" "resolvconf" ] (_: loose);

  config = {
    networking.firewall.trustedInterfaces = [ "lo" ];
    testos.firewall = optionalString cfg.enable ruleset + optionalString config.networking.nftables.enable config.networking.nftables.ruleset;
  };
}
