# One node, from its first boot to its end: runs in a mount namespace of its own, which takes the mounts with it
# however the node ends. NODE DIR CGROUP LOWER PLAIN INSTALL NETNS ADDRESS GATEWAY come from power.go.

# The host's /sys/fs/cgroup may be v1 or hybrid. Here it is cgroup2, whatever the host's is.
umount -R -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
cgroup=/sys/fs/cgroup/$CGROUP
mkdir "$cgroup/boot"
echo $$ >"$cgroup/boot/cgroup.procs"

# nspawn keeps files by machine name here: nodes of two labs may have the same.
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn

disk=$DIR
if [ -e "$DIR/disk.img" ]; then
  disk=$DIR/disk
  # After a power cut the kernel may still be letting go of the last mount.
  while [ -n "$(losetup --associated "$DIR/disk.img")" ]; do sleep 0.02; done
  mount -o loop "$DIR/disk.img" "$disk"
  mkdir -p "$disk/upper" "$disk/work" "$disk/containers"
fi

# A plain node that was made a NixOS has a disk of its own for that, beside the one that it had before.
system=$disk
lower=${PLAIN:-$LOWER}
if [ -n "$PLAIN" ] && [ -d "$disk/nixos" ]; then
  system=$disk/nixos
  lower=$LOWER
fi
insert_disk() { # LAYERS DISK
  mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$DIR/root"
  # On a full disk this fails and the node boots with what it has.
  cp -a --update "$DIR/seed/." "$DIR/root/" || true
}
insert_disk "$lower" "$system"

if [ -e "$DIR/sudo-user" ]; then
  user=$(cat "$DIR/sudo-user")
  chroot "$DIR/root" id "$user" || chroot "$DIR/root" useradd --create-home --shell /bin/bash "$user"
  install -d -m 700 "$DIR/root/home/$user/.ssh"
  install -m 600 "$DIR/sudo-keys" "$DIR/root/home/$user/.ssh/authorized_keys"
  chroot "$DIR/root" chown -R "$user:$user" "/home/$user/.ssh"
  echo "$user ALL=(ALL) NOPASSWD: ALL" >"$DIR/root/etc/sudoers.d/lab"
  echo "PermitRootLogin no" >"$DIR/root/etc/ssh/sshd_config.d/a-root.conf" # the first file that says it wins
  rm "$DIR/sudo-user"
fi

# What NixOS's boot does where it finds /etc/NIXOS_LUSTRATE: the files named in that stay, all else of the old system is
# out of the way, and the new one boots. The new one is made here, of /etc/nixos, where there is the network for it
# on a real machine's old system.
lustrate() {
  new=$disk/nixos.new
  rm -rf "$new"
  mkdir -p "$new/upper" "$new/work"
  while read -r kept; do
    [ ! -e "$DIR/root/$kept" ] || (cd "$DIR/root" && cp -a --parents "$kept" "$new/upper/")
  done <"$DIR/root/etc/NIXOS_LUSTRATE"
  umount -R "$DIR/root"
  rm -rf "$DIR/seed/root" "$DIR/seed/etc/ssh" # what the old system's owner had put there
  insert_disk "$LOWER" "$new"
  mount --rbind /dev "$DIR/root/dev"
  mount -t tmpfs tmpfs "$DIR/root/run"
  mount -t tmpfs tmpfs "$DIR/root/tmp"
  cp -r "$DIR/root/usr/lib/testos/base" "$DIR/root/tmp/system"
  cp "$DIR/root/etc/nixos/"* "$DIR/root/tmp/system/"
  sed -i "s/\"base\"/\"$NODE\"/" "$DIR/root/tmp/system/flake.nix"
  # In a process namespace: when Nix is done with a build, it kills all that its build user runs, other nodes' builds too.
  unshare --pid --fork --kill-child --mount-proc="$DIR/root/proc" chroot "$DIR/root" /bin/sh -euc "$INSTALL" install /tmp/system "$NODE"
  umount -R "$DIR/root"
  mv "$new" "$disk/nixos"
  insert_disk "$LOWER" "$disk/nixos"
}

[ -e "$DIR/uuid" ] || tr -d - </proc/sys/kernel/random/uuid >"$DIR/uuid"
# What containers in a node need: an overlay of theirs can't lie on the node's.
binds="--bind=$disk/containers:/var/lib/containers"
for device in /dev/net/tun /dev/fuse; do
  [ ! -e "$device" ] || binds="$binds --bind=$device"
done

export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 SYSTEMD_NSPAWN_API_VFS_WRITABLE=network
while :; do
  [ ! -e "$DIR/root/etc/NIXOS_LUSTRATE" ] || lustrate
  # A machine that starts has no rules and no addresses from before; these are what its cable gives it.
  nsenter --net="$NETNS" sh -euc '
    nft flush ruleset
    ip link set lo up
    ip addr flush dev eth0
    ip addr add "$ADDRESS" dev eth0
    ip link set eth0 up
    ip route replace default via "$GATEWAY"'
  # nspawn starts in the node's own group and splits it into supervisor and payload. A group can't hold both
  # processes and groups with controllers, so the last boot's split goes first.
  find "$cgroup" -mindepth 1 -depth -type d -exec rmdir {} + 2>/dev/null || true
  for controller in $(cat "$cgroup/cgroup.subtree_control"); do
    echo "-$controller" >"$cgroup/cgroup.subtree_control" || true
  done
  result=0
  # shellcheck disable=SC2086 # $binds is a list
  setsid --wait sh -euc 'echo $$ >"$0"; exec systemd-nspawn "$@"' "$cgroup/cgroup.procs" \
    --quiet --register=no --keep-unit --boot --machine="$NODE" \
    --uuid="$(cat "$DIR/uuid")" --directory="$DIR/root" --network-namespace-path="$NETNS" --capability=CAP_NET_ADMIN,CAP_BPF \
    --system-call-filter="@keyring bpf" --link-journal=no --resolv-conf=off --timezone=off --console=read-only \
    $binds || result=$?
  # 133 is a reboot: with --keep-unit nspawn leaves starting it again to its caller.
  [ "$result" = 133 ] || exit "$result"
done
