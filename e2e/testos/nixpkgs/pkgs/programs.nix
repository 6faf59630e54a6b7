# Names of nixpkgs, and which of Debian's packages has their programs. Versions are those of Debian 13.
{
  acl.version = "2.3.2";
  bash = { version = "5.2.37"; passthru.shellPath = "/bin/bash"; };
  bashInteractive = { version = "5.2.37"; from = "bash"; main = "bash"; passthru.shellPath = "/bin/bash"; };
  busybox = {
    version = "1.37.0";
    from = "busybox-static";
    more = ''for applet in $(busybox --list); do ln -sf /usr/bin/busybox "$out/bin/$applet"; done'';
  };
  cacert = { version = "2025"; from = "ca-certificates"; links."etc/ssl/certs/ca-bundle.crt" = "/etc/ssl/certs/ca-certificates.crt"; };
  confd.version = "0.16.0"; # Debian has none: for evaluation
  conmon.version = "2.1.12";
  coreutils = { version = "9.7"; main = "ls"; links."bin/kill" = "/usr/bin/kill"; };
  curl.version = "8.14.1";
  diffutils = { version = "3.10"; main = "diff"; };
  distribution = { version = "2.8.3"; from = "docker-registry"; main = "registry"; links."bin/registry" = "/usr/bin/docker-registry"; };
  etcd = { version = "3.5.16"; from = "etcd-server"; links."bin/etcdctl" = "/usr/bin/etcdctl"; }; # Debian has that in etcd-client
  findutils = { version = "4.10.0"; main = "find"; };
  flannel.version = "0.26.7"; # Debian has none: for evaluation
  gawk = { version = "5.2.1"; from = "mawk"; main = "awk"; links."bin/awk" = "/usr/bin/mawk"; };
  getent = { version = "2.41"; from = "libc-bin"; };
  git.version = "2.47.3";
  gnugrep = { version = "3.11"; from = "grep"; main = "grep"; };
  gnused = { version = "4.9"; from = "sed"; main = "sed"; };
  gnutar = { version = "1.35"; from = "tar"; main = "tar"; };
  gzip.version = "1.13";
  harmonia = { version = "3.1.0"; main = "harmonia-cache"; }; # Debian has none: for evaluation
  haproxy.version = "3.0.11";
  iptables = { version = "1.8.11"; links."bin/iptables" = "/usr/sbin/iptables"; };
  iproute2 = { version = "6.15.0"; main = "ip"; };
  iputils = { version = "20240905"; from = "iputils-ping"; main = "ping"; };
  jq.version = "1.7.1";
  kmod.version = "34.2";
  nats-server.version = "2.10.27";
  netcat = { version = "1.229"; from = "netcat-openbsd"; main = "nc"; links."bin/nc" = "/usr/bin/nc.openbsd"; };
  nettools = { version = "2.10"; from = "net-tools"; main = "netstat"; };
  nftables = { version = "1.1.3"; main = "nft"; };
  nginx.version = "1.26.3";
  nix = { version = "2.26.3"; from = "nix-bin"; };
  openssh = { version = "10.0"; from = "openssh-client"; main = "ssh"; };
  openssl.version = "3.5.1";
  podman.version = "5.4.2";
  procps = { version = "4.0.4"; main = "ps"; };
  python3 = { version = "3.13.5"; from = "python3-minimal"; };
  rsync.version = "3.4.1";
  shadow = { version = "4.17.4"; from = "passwd"; main = "passwd"; };
  socat.version = "1.8.0";
  sudo.version = "1.9.16";
  systemd = { version = "257.8"; main = "systemctl"; };
  util-linux = { version = "2.41"; main = "mount"; };
  wireguard-tools = { version = "1.0.20210914"; main = "wg"; };
  xz = { version = "5.8.1"; from = "xz-utils"; };
}
