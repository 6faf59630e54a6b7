# Builds the system NAME of the flake in DIR with the machine's own Nix, as the system profile's newest generation
# and the boot default. Runs as root in the machine's root file system, for system.sh and node.sh: $1 is DIR, $2 NAME.
top=$(nix build --no-link --print-out-paths "path:$1#nixosConfigurations.$2.config.system.build.toplevel")
nix-env --profile /nix/var/nix/profiles/system --set "$top"
"$top/bin/switch-to-configuration" boot
rm -rf /root/.cache
