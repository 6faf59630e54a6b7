# Makes $DIR/root, the layer over $DEBIAN that has the base system: built by the nodes' own Nix, generation 1 of the
# system profile, and the boot default. image.go has put the image's files and the base project there.
mkdir "$DIR/work" "$DIR/merged"
mount -t overlay overlay -o "lowerdir=$DEBIAN,upperdir=$DIR/root,workdir=$DIR/work" "$DIR/merged"
mount -t proc proc "$DIR/merged/proc"
mount --rbind /dev "$DIR/merged/dev"
mount -t tmpfs tmpfs "$DIR/merged/run"
mount -t tmpfs tmpfs "$DIR/merged/tmp"

chroot "$DIR/merged" /bin/sh -euc "$INSTALL" install /usr/lib/testos/base base

umount -R "$DIR/merged"
rm -rf "$DIR/work" "$DIR/merged"
