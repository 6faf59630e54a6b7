# Makes $DIR/root: a Debian that boots fast as a node and holds nothing of any node's identity.
# DIR SUITE PACKAGES come from image.go, which has left sources.list there.
root=$DIR/root

# This machine's way to its mirrors, as far as apt has been told of one, is the way to these as well.
apt-config dump | grep -E '^Acquire::(https?::.*|Check-Valid-Until|Check-Date) ' >"$DIR/apt.conf" || true
echo 'Acquire::Languages "none";' >>"$DIR/apt.conf"

mmdebstrap --quiet --variant=minbase --mode=root --include="$PACKAGES" --aptopt="$DIR/apt.conf" \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
  "$SUITE" "$root" "$DIR/sources.list"
rm -f "$DIR/apt.conf" "$DIR/sources.list" "$root/etc/apt/apt.conf.d/99mmdebstrap"

rm -f "$root"/etc/ssh/ssh_host_* "$root/etc/machine-id" "$root/var/lib/dbus/machine-id" "$root/var/lib/systemd/random-seed"
: >"$root/etc/machine-id"
# Nobody answers names in the lab: without a server a name that /etc/hosts lacks fails at once, not after 10 s.
: >"$root/etc/resolv.conf"
chroot "$root" passwd -d root

write() { # PATH: from standard input
  mkdir -p "$(dirname "$root$1")"
  cat >"$root$1"
}
# Builds are not sandboxed: the base system's builders are Debian's own programs.
write /etc/nix/nix.conf <<'F'
experimental-features = nix-command flakes
sandbox = false
build-users-group = nixbld
substituters =
max-jobs = 1
cores = 1
trusted-users = root
flake-registry =
F
write /etc/systemd/journald.conf.d/lab.conf <<'F'
[Journal]
Storage=persistent
SystemMaxUse=32M
ForwardToConsole=no
F
# The second keys file is where NixOS keeps the declared ones.
write /etc/ssh/sshd_config.d/lab.conf <<'F'
PermitRootLogin prohibit-password
PasswordAuthentication no
UseDNS no
AuthorizedKeysFile .ssh/authorized_keys /etc/ssh/authorized_keys.d/%u
F
# Where the host's controllers are bound to cgroup v1, podman can't limit processes in a node.
write /etc/containers/containers.conf.d/lab.conf <<'F'
[containers]
pids_limit = 0
F

# No hardware, no terminals and no housekeeping in a node.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
  getty@.service console-getty.service systemd-remount-fs.service dev-hugepages.mount \
  systemd-udevd.service systemd-udev-trigger.service; do
  ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
# What LAB_PACKAGES brings is there, but a test or a configuration starts it.
for unit in etcd haproxy nginx nats-server podman podman.socket podman-auto-update.timer podman-restart \
  podman-clean-transient netavark-dhcp-proxy.socket netavark-firewalld-reload; do
  chroot "$root" systemctl disable "$unit" >/dev/null 2>&1 || true
done

# The work of a first boot, done once here instead of in every node.
chroot "$root" systemd-sysusers
chroot "$root" journalctl --update-catalog
chroot "$root" ldconfig
touch "$root/etc/.updated" "$root/var/.updated"
touch -r "$root/usr" "$root/etc/.updated" "$root/var/.updated"
