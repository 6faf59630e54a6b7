package lab

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/e2e/testos"
)

// The nodes' root file system is two read-only layers: Debian, which takes half a minute and hardly ever changes,
// and the base system on it, which takes a second and changes with testos. Plain nodes have another second layer,
// which takes Nix away. A layer's name holds the hash of all that it is made from, so a stale one is never used.
var (
	//go:embed debian.sh
	debianScript string
	//go:embed system.sh
	systemScript string
	//go:embed plain.sh
	plainScript string
	//go:embed install.sh
	installScript string
)

// InfectScript is the lab's stand-in of nixos-infect, for a plain node.
//
//go:embed infect.sh
var InfectScript string

const suite = "trixie"

// nodePackages is what a node has beyond Debian's minimum. LAB_PACKAGES (comma separated) adds to it.
var nodePackages = []string{
	"systemd", "systemd-sysv", "dbus", "openssh-server", "openssh-client", "iproute2", "iputils-ping", "nftables",
	"procps", "ca-certificates", "kmod", "libnss-systemd", "nix-bin", "nix-setup-systemd", "git", "curl", "jq", "netcat-openbsd",
	"sudo", "busybox-static", "etcd-server", "etcd-client", "haproxy",
}

// mirrorPause is what a mirror gets that fails: one that is just being updated has other packages than its lists say.
const mirrorPause = 20 * time.Second

// unusedFor is how long a layer is kept that no lab has asked for.
const unusedFor = 14 * 24 * time.Hour

func cacheDir() string {
	if dir := os.Getenv("LAB_CACHE"); dir != "" {
		return dir
	}
	return "/var/cache/nix-infra-lab"
}

// lowerdirs are layers' folders as overlayfs takes them, the top one first.
func lowerdirs(layers []string) string {
	var dirs []string
	for _, layer := range layers {
		dirs = append(dirs, filepath.Join(cacheDir(), layer, "root"))
	}
	return strings.Join(dirs, ":")
}

// image is the names of the layers, the top one first.
type image struct{ system, plain []string }

// ensureImage makes the layers that are missing.
func ensureImage(ctx context.Context, log io.Writer) (*image, error) {
	unlock, err := lock(ctx, filepath.Join(cacheDir(), "image.lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	packages := nodePackages
	if more := os.Getenv("LAB_PACKAGES"); more != "" {
		packages = append(packages[:len(packages):len(packages)], strings.Split(more, ",")...)
	}
	debian := "debian-" + hash(suite, strings.Join(packages, ","), debianScript)
	makeIt := func(dir string) error {
		fmt.Fprintln(log, "making the nodes' root file system, which takes about half a minute and happens once")
		return makeDebian(ctx, dir, packages)
	}
	err = ensureLayer(debian, makeIt)
	if err != nil && ctx.Err() == nil {
		fmt.Fprintf(log, "that failed, and is tried once more in %s: %v\n", mirrorPause, err)
		select {
		case <-ctx.Done():
		case <-time.After(mirrorPause):
			err = ensureLayer(debian, makeIt)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("lab: root file system: %w", err)
	}
	sum, err := testos.Hash()
	if err != nil {
		return nil, err
	}
	system := "system-" + hash(debian, systemScript, installScript, sum)
	if err := ensureLayer(system, func(dir string) error {
		fmt.Fprintln(log, "building the nodes' base system")
		return makeSystem(ctx, dir, filepath.Join(cacheDir(), debian, "root"))
	}); err != nil {
		return nil, fmt.Errorf("lab: base system: %w", err)
	}
	plain := "plain-" + hash(debian, plainScript)
	if err := ensureLayer(plain, func(dir string) error {
		fmt.Fprintln(log, "taking Nix away for the plain nodes")
		return script(ctx, plainScript, "DIR="+dir, "DEBIAN="+filepath.Join(cacheDir(), debian, "root"))
	}); err != nil {
		return nil, fmt.Errorf("lab: plain system: %w", err)
	}
	pruneLayers(log, debian, system, plain)
	return &image{system: []string{system, debian}, plain: []string{plain, debian}}, nil
}

func hash(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:6])
}

// ensureLayer has make fill a temporary folder and renames it, so that a killed one leaves nothing half-made.
func ensureLayer(name string, make func(dir string) error) error {
	dir := filepath.Join(cacheDir(), name)
	now := time.Now()
	if err := os.Chtimes(dir, now, now); err == nil {
		return nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// The pid: a build whose lab was killed may still be writing to its own. pruneLayers removes that.
	tmp := fmt.Sprintf("%s.%d.tmp", dir, os.Getpid())
	if err := os.MkdirAll(filepath.Join(tmp, "root"), 0o755); err != nil {
		return err
	}
	if err := make(tmp); err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	return os.Rename(tmp, dir)
}

// pruneLayers removes layers that no lab uses and none has asked for in a while.
func pruneLayers(log io.Writer, keep ...string) {
	used := map[string]bool{}
	for _, name := range keep {
		used[name] = true
	}
	labs, _ := List()
	for _, name := range labs {
		if l, err := attach(name, io.Discard); err == nil {
			for _, layer := range append(l.state.Layers, l.state.PlainLayers...) {
				used[layer] = true
			}
		}
	}
	entries, _ := os.ReadDir(cacheDir())
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !e.IsDir() || used[e.Name()] {
			continue
		}
		if strings.HasSuffix(e.Name(), ".tmp") || time.Since(info.ModTime()) > unusedFor {
			fmt.Fprintf(log, "removing the unused layer %s\n", e.Name())
			_ = os.RemoveAll(filepath.Join(cacheDir(), e.Name()))
		}
	}
}

func makeDebian(ctx context.Context, dir string, packages []string) error {
	main, security, err := mirrors(ctx)
	if err != nil {
		return err
	}
	sources := fmt.Sprintf("deb %s %s main\ndeb %s %s-updates main\n", main, suite, main, suite)
	if security != "" {
		sources += fmt.Sprintf("deb %s %s-security main\n", security, suite)
	}
	if err := os.WriteFile(filepath.Join(dir, "sources.list"), []byte(sources), 0o644); err != nil {
		return err
	}
	return script(ctx, debianScript, "DIR="+dir, "SUITE="+suite, "PACKAGES="+strings.Join(packages, ","))
}

func makeSystem(ctx context.Context, dir, debian string) error {
	root := filepath.Join(dir, "root")
	if err := testos.InstallImage(root); err != nil {
		return err
	}
	if err := testos.WriteBase(filepath.Join(root, "usr/lib/testos/base"), testos.Values{NodeName: "base"}); err != nil {
		return err
	}
	return script(ctx, systemScript, "DIR="+dir, "DEBIAN="+debian, "INSTALL="+installScript)
}

// script runs one of the build scripts in mount and process namespaces of its own: whatever it mounts or leaves
// running is gone when it ends.
func script(ctx context.Context, text string, env ...string) error {
	cmd := command(ctx, "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child",
		"/bin/sh", "-euc", text, "lab-image")
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=/root"}, env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		const tail = 4000
		return fmt.Errorf("%w\n%s", err, out[max(0, len(out)-tail):])
	}
	return nil
}

// mirrors are the Debian mirrors that this machine's apt uses, or LAB_MIRROR and LAB_SECURITY_MIRROR.
func mirrors(ctx context.Context) (main, security string, err error) {
	if main = os.Getenv("LAB_MIRROR"); main != "" {
		return main, os.Getenv("LAB_SECURITY_MIRROR"), nil
	}
	for _, update := range []bool{false, true} {
		if update { // without the lists apt doesn't know whose repositories they are
			if _, err := run(ctx, "apt-get", "-qq", "-o", aptRetries, "update"); err != nil {
				return "", "", err
			}
		}
		out, err := run(ctx, "apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages")
		if err != nil {
			return "", "", err
		}
		for line := range strings.Lines(string(out)) {
			switch f := strings.Split(strings.TrimSpace(line), "|"); {
			case len(f) == 3 && f[0] == "Debian" && f[1] == "Debian" && main == "":
				main = f[2]
			case len(f) == 3 && f[0] == "Debian" && f[1] == "Debian-Security" && security == "":
				security = f[2]
			}
		}
		if main != "" {
			return main, security, nil
		}
	}
	return "", "", errors.New("this machine's apt has no Debian mirror; set LAB_MIRROR to one, and LAB_SECURITY_MIRROR to one for security updates")
}
