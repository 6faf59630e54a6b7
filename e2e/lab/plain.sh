# Makes $DIR/root, the layer over $DEBIAN of a plain node: the same Debian, without Nix. DIR DEBIAN come from image.go.
mkdir "$DIR/work" "$DIR/merged"
mount -t overlay overlay -o "lowerdir=$DEBIAN,upperdir=$DIR/root,workdir=$DIR/work" "$DIR/merged"
mount -t proc proc "$DIR/merged/proc"
mount -t tmpfs tmpfs "$DIR/merged/run"

chroot "$DIR/merged" dpkg --purge --force-depends nix-bin nix-setup-systemd
rm -rf "$DIR/merged/nix" "$DIR/merged/etc/nix"

umount -R "$DIR/merged"
rm -rf "$DIR/work" "$DIR/merged"
