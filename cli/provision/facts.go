package provision

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Facts are what a machine says of itself before anything is done to it.
type Facts struct {
	NixOS  bool   // it runs NixOS, and no installer of it
	OS     string // such as Debian GNU/Linux 12 (bookworm)
	Debian bool   // or something that is made of it
	Arch   string // as uname says, such as x86_64
	BootID string

	// What matters to a script that converts it.
	SSHPorts   string // where its sshd listens, separated by spaces; "" where that is not known
	FixedOn    string // the interface of its default route, where an address of that is not from DHCP; else ""
	FixedFirst bool   // that is its first interface
	TmpMemory  bool   // its /tmp is in memory
}

// lookScript prints facts a line each. A machine that runs NixOS has a current system that tells its version, which one that
// was converted and not rebooted has not, and an installer is told by its VARIANT_ID.
const lookScript = `echo "uid=$(id -u)"
echo "uname=$(uname -sm)"
echo "boot=$(cat /proc/sys/kernel/random/boot_id)"
[ -d /run/systemd/system ] && echo systemd=1
[ -e /run/current-system/nixos-version ] && echo nixos=1
echo "ports=$(sshd -T 2>/dev/null | sed -n 's/^port //p' | tr '\n' ' ')"
dev=$(ip -4 route show default 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1)
if [ -n "$dev" ] && ip -4 -o address show dev "$dev" scope global | grep -qv ' dynamic '; then
  echo "fixed=$dev"
  echo "index=$(cat "/sys/class/net/$dev/ifindex")"
fi
[ "$(stat -f -c %T /tmp 2>/dev/null)" = tmpfs ] && echo tmp=memory
sed -n 's/^\(ID\|ID_LIKE\|PRETTY_NAME\|VARIANT_ID\)=/&/p' /etc/os-release || true`

// Look asks a machine what it is. One that can't be brought in is an error that says what can.
func Look(ctx context.Context, m *Machine) (Facts, error) {
	out, err := run(ctx, stepTime, m, nil, "sh", "-c", lookScript)
	if err != nil {
		return Facts{}, err
	}
	return parseFacts(string(out))
}

var bootIDForm = regexp.MustCompile(`^[0-9a-f-]{32,36}$`)

func parseFacts(text string) (Facts, error) {
	said := map[string]string{}
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(strings.TrimRight(line, "\r\n"), "="); ok {
			said[key] = strings.Trim(value, `"'`)
		}
	}
	kernel, arch, _ := strings.Cut(said["uname"], " ")
	f := Facts{
		NixOS: said["nixos"] == "1" && said["VARIANT_ID"] != "installer",
		OS:    said["PRETTY_NAME"], Arch: arch, BootID: said["boot"],
		SSHPorts: strings.TrimSpace(said["ports"]), FixedOn: said["fixed"], FixedFirst: said["index"] == "2", TmpMemory: said["tmp"] == "memory", // 1 is the loopback
	}
	like := append(strings.Fields(said["ID_LIKE"]), said["ID"])
	f.Debian = !f.NixOS && (slices.Contains(like, "debian") || slices.Contains(like, "ubuntu"))
	switch {
	case said["uid"] != "0":
		return f, errors.New("commands don't run as root there; log in as root, or as a user who may sudo without a password")
	case kernel != "Linux" || said["systemd"] != "1":
		return f, fmt.Errorf("it says that it is %q; a Linux machine with systemd is needed", strings.TrimSpace(kernel+" "+f.OS))
	case f.Arch != "x86_64" && f.Arch != "aarch64":
		return f, fmt.Errorf("it is of type %q; x86_64 and aarch64 are supported", f.Arch)
	case !bootIDForm.MatchString(f.BootID):
		return f, fmt.Errorf("its boot id is %q", f.BootID)
	}
	return f, nil
}
