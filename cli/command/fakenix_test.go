package command

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// system is the store path that the nix of these tests gives a node's system.
func system(node string) string {
	return "/nix/store/" + strings.Repeat("0", 32) + "-nixos-system-" + node
}

// fakeNix stands in for nix in all tests of this package. It can build what has a hardware-configuration.nix and no
// file that says BROKEN (where one says SLOW, not before long), locks a flake that has no lock, and writes what it is asked to push and sign into the folder
// that a file: cache names. Arguments: --extra-experimental-features … and then those of the command.
const fakeNix = `#!/bin/sh
shift 2
command=$1
for last; do :; done
case $command in
build)
	dir=${2#path:}; dir=${dir%%#*}
	echo "evaluating $2" >&2
	if [ ! -f "$dir/hardware-configuration.nix" ]; then echo "error: there is no hardware-configuration.nix" >&2; exit 1; fi
	if [ -f "$dir/nix-infra/default.nix" ] && [ ! -f "$dir/nix-infra/facts.json" ]; then echo "error: there are no facts" >&2; exit 1; fi
	if grep -rq BROKEN "$dir"; then echo "error: attribute 'BROKEN' missing" >&2; exit 1; fi
	if grep -rq SLOW "$dir"; then sleep 1000; fi
	[ -f "$dir/flake.lock" ] || echo '{}' >"$dir/flake.lock"
	echo "/nix/store/00000000000000000000000000000000-nixos-system-${dir##*/}"
	;;
flake)
	dir=${3#path:}
	if grep -q '%%' "$dir/flake.nix"; then echo "error: placeholders in $dir/flake.nix" >&2; exit 1; fi
	echo '{"locked":true}' >"$dir/flake.lock"
	;;
copy)
	cache=${3#file://}
	if [ ! -d "$cache" ]; then echo "error: $cache is no folder" >&2; exit 1; fi
	echo "copy $4" >>"$cache/log"
	;;
store)
	for word; do [ "$before" = --store ] && cache=${word#file://}; before=$word; done
	echo "sign $last with $(cat /dev/fd/3)" >>"$cache/log"
	;;
*)
	echo "error: what is $*?" >&2; exit 1
	;;
esac
`

// fakeStore stands in for nix-store: what it adds has a hash by which program it is.
var fakeStore = `#!/bin/sh
case $1 in
--add-fixed) [ -x "$4/bin/${4##*/}" ] && echo "/nix/store/00000000000000000000000000000000-${4##*/}" ;;
--query) case $3 in *-nix-infra-agent) echo sha256:` + agentHash + ` ;; *) echo sha256:` + controllerHash + ` ;; esac ;;
esac
`

var (
	agentHash      = strings.Repeat("a", 52)
	controllerHash = strings.Repeat("c", 52)
)

// installFakeNix puts them in front of everything else.
func installFakeNix() (remove func(), err error) {
	dir, err := os.MkdirTemp("", "fakenix-")
	if err != nil {
		return nil, err
	}
	for program, text := range map[string]string{"nix": fakeNix, "nix-store": fakeStore} {
		if err := os.WriteFile(filepath.Join(dir, program), []byte(text), 0o755); err != nil {
			return nil, err
		}
	}
	return func() { os.RemoveAll(dir) }, os.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// needsFakeNix skips a test where a real nix would be found first.
func needsFakeNix(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/run/current-system/sw/bin/nix"); err == nil {
		t.Skip("a real nix comes first here")
	}
}
