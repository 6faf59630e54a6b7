#!/usr/bin/env bash
# The lab's stand-in of nixos-infect (https://github.com/elitak/nixos-infect), which needs the internet: what that does
# for a whole NixOS, this does for a plain node of the lab. As there, root runs it with NO_REBOOT and NIX_CHANNEL in the
# environment; it writes /etc/nixos, where root is let in with the keys that root or $SUDO_USER had, and the network is
# written down where doNetConf or Hetzner as PROVIDER says so; and it says in /etc/NIXOS_LUSTRATE what stays. The boot after
# it is the new system (node.sh). A configuration that is there is kept. As there, it fails where it would swap to a /tmp
# that is in memory, unless NO_SWAP says that it need not, and without EFI where nobody says where bootFs is.
#
# It takes its time, as a download would. For tests it waits, half done, while there is /run/lab-infect-hold, and ends
# with the words in /run/lab-infect-fail where that is there.
set -eu -o pipefail

[ "$(id -u)" = 0 ] || { echo "ERROR: Must run as root"; exit 1; }
channel=${NIX_CHANNEL:-nixos-25.11}

[ "${PROVIDER:-}" != hetznercloud ] || doNetConf=y
if [ -z "${NO_SWAP:-}" ] && [ "$(stat -f -c %T /tmp)" = tmpfs ]; then
  echo "swapon: /tmp/nixos-infect.swp: swapon failed: Invalid argument"
  exit 255
fi

echo "fetching Nix"
sleep 1
if [ ! -e /etc/nixos/configuration.nix ]; then
  keys=
  for file in /root/.ssh/authorized_keys "/home/${SUDO_USER:-root}/.ssh/authorized_keys"; do
    if [ -s "$file" ]; then
      keys=$(cat "$file")
      break
    fi
  done
  mkdir -p /etc/nixos
  cat >/etc/nixos/hardware-configuration.nix <<F
# This machine's hardware: a container has none to speak of.
{ ... }: { }
F
  if [ -n "${doNetConf:-}" ]; then
    cat >/etc/nixos/networking.nix <<F
# This file was populated at runtime with the networking details gathered from the active system.
{ ... }: { etc."testos/networking".text = "$(ip -4 -o address show dev eth0 | awk '{ print $4 }')\n"; }
F
  fi
  cat >/etc/nixos/configuration.nix <<F
{ ... }: {
  imports = [
    ./hardware-configuration.nix
    ${doNetConf:+./networking.nix}
  ];
  etc."testos/node".text = "$(hostname -s) ${channel#nixos-}\n";
  etc."ssh/authorized_keys.d/root" = {
    text = ''$keys
'';
    mode = "0600";
  };
}
F
fi

echo "unpacking $channel"
while [ -e /run/lab-infect-hold ]; do sleep 0.1; done
if [ -e /run/lab-infect-fail ]; then
  cat /run/lab-infect-fail
  exit 1
fi
sleep 1

echo "installing the boot loader"
[ -d /sys/firmware/efi ] || [ -n "${bootFs:-}" ] || { echo "mv: missing destination file operand after '.bak'"; exit 1; }
touch /etc/NIXOS
{
  echo etc/nixos
  echo etc/resolv.conf
  (cd / && ls etc/ssh/ssh_host_*_key*)
} >/etc/NIXOS_LUSTRATE

[ -n "${NO_REBOOT:-}" ] || reboot
