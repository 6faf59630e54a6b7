// Package provision brings machines into the fleet: over SSH, which is used once, or with files that
// somebody carries.
//
// Start here: Arrival (arrival.go) is the way of a machine, whatever runs on it, to one that runs NixOS, by the
// conversion in convert.go; Install, here, is the way of a program onto it. ssh.go is how the machine is reached,
// hostkey.go how it is known to be the same one, provider.go where machines come from, ca.go what the operator signs.
package provision

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// Program is what gets installed: the agent or the controller.
type Program struct {
	Name string // of the program, its unit and its state folder
	Role protocol.Role
	Unit string // text of the systemd unit
}

// Agent is the agent.
var Agent = Program{Name: "nix-infra-agent", Role: protocol.Node, Unit: machine.AgentUnit}

// Controller is the controller: a connection a node, so many files.
var Controller = Program{Name: "nix-infra-controller", Role: protocol.Controller, Unit: `[Unit]
Description=nix-infra controller
After=network.target
StartLimitIntervalSec=0

[Service]
Type=notify
Environment=PATH=` + machine.SearchPath + `
ExecStart=/var/lib/nix-infra-controller/bin/nix-infra-controller run
Restart=always
RestartSec=1
WatchdogSec=60
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
`}

func (p Program) dir() string    { return "/var/lib/" + p.Name }
func (p Program) binary() string { return p.dir() + "/bin/" + p.Name }
func (p Program) unit() string   { return p.Name + ".service" }

// FindBinary finds the program for a machine (uname -m): beside the running executable as
// NAME-linux-ARCH, or as NAME where that fits.
func (p Program) FindBinary(machine string) (string, error) {
	arch, ok := map[string]string{"x86_64": "amd64", "aarch64": "arm64"}[machine]
	if !ok {
		return "", fmt.Errorf("there is no %s for machines of type %q; x86_64 and aarch64 are supported", p.Name, machine)
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if real, err := filepath.EvalSymlinks(self); err == nil {
		self = real
	}
	candidates := []string{p.Name + "-linux-" + arch, p.Name}
	for _, c := range candidates {
		path := filepath.Join(filepath.Dir(self), c)
		if fits(path, arch) {
			return path, nil
		}
	}
	return "", fmt.Errorf("there is no %s or %s for linux/%s in %s; build it or name it with --%s-binary",
		candidates[0], candidates[1], arch, filepath.Dir(self), strings.TrimPrefix(p.Name, "nix-infra-"))
}

// fits tells whether a file is an ELF program for an architecture.
func fits(path, arch string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	head := make([]byte, 20)
	if n, _ := f.Read(head); n < len(head) || !bytes.HasPrefix(head, []byte("\x7fELF")) {
		return false
	}
	machine := uint16(head[18]) | uint16(head[19])<<8 // e_machine; both architectures are little-endian
	return machine == map[string]uint16{"amd64": 62, "arm64": 183}[arch]
}

// Installation is one machine on its way into the fleet.
type Installation struct {
	Program Program
	Name    string // of the machine in the fleet
	Binary  string // file; "": FindBinary
	Sign    func(*protocol.EnrolRequest) (*protocol.EnrolAnswer, error)
	Step    func(what string) // called before each step
}

// Time that one step may take.
const (
	stepTime   = time.Minute
	uploadTime = 10 * time.Minute
)

// Install puts the program onto a machine, has the machine make its keys, signs them, and starts it.
// Doing it again is safe: it replaces the program and keeps the keys. Lasting tells whether the unit
// is still there after a boot.
func Install(ctx context.Context, m *Machine, i Installation) (request *protocol.EnrolRequest, lasting bool, err error) {
	step := ""
	begin := func(what string) { step = what; i.Step(what) }
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", step, err)
		}
	}()
	begin("look at the machine")
	binary, err := i.binary(ctx, m)
	if err != nil {
		return nil, false, err
	}
	begin("upload " + i.Program.Name)
	data, err := os.ReadFile(binary)
	if err != nil {
		return nil, false, err
	}
	if _, err := run(ctx, uploadTime, m, nil, "mkdir", "-p", "-m", "0700", i.Program.dir(), i.Program.dir()+"/bin"); err != nil {
		return nil, false, err
	}
	if err := upload(ctx, m, i.Program.binary(), data, "0700"); err != nil {
		return nil, false, err
	}
	begin("make its keys")
	if request, err = i.request(ctx, m); err != nil {
		return nil, false, err
	}
	begin("sign")
	answer, err := i.Sign(request)
	if err != nil {
		return nil, false, err
	}
	begin("hand over what it has to trust")
	if _, err := run(ctx, stepTime, m, protocol.Encode(answer), i.Program.binary(), "load", "-"); err != nil {
		return nil, false, err
	}
	begin("install and start " + i.Program.unit())
	lasting, err = i.start(ctx, m)
	return request, lasting, err
}

func run(ctx context.Context, limit time.Duration, m *Machine, stdin []byte, argv ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s took longer than %s", argv[0], limit))
	defer cancel()
	return m.Run(ctx, bytes.NewReader(stdin), argv...)
}

func (i Installation) binary(ctx context.Context, m *Machine) (string, error) {
	out, err := run(ctx, stepTime, m, nil, "uname", "-sm")
	if err != nil {
		return "", err
	}
	words := strings.Fields(string(out))
	if len(words) != 2 || words[0] != "Linux" {
		return "", fmt.Errorf("it says that it is %q; a Linux machine with systemd is needed", strings.TrimSpace(string(out)))
	}
	if i.Binary != "" {
		return i.Binary, nil
	}
	return i.Program.FindBinary(words[1])
}

// uploadScript writes its input to $1 with mode $2 if it hashes to $3: in one move, so that whoever
// starts the file meanwhile gets the old one or the new one.
const uploadScript = `set -eu
umask 077
new=$(mktemp "$1.XXXXXX")
trap 'rm -f "$new"' EXIT
cat > "$new"
[ "$(sha256sum < "$new" | cut -c1-64)" = "$3" ] || { echo "what arrived is not what was sent" >&2; exit 1; }
chmod "$2" "$new"
sync "$new" 2>/dev/null || sync
mv -f "$new" "$1"`

func upload(ctx context.Context, m *Machine, path string, data []byte, mode string) error {
	_, err := run(ctx, uploadTime, m, data, "sh", "-c", uploadScript, "upload", path, mode, protocol.Digest(data))
	return err
}

func (i Installation) request(ctx context.Context, m *Machine) (*protocol.EnrolRequest, error) {
	out, err := run(ctx, stepTime, m, nil, i.Program.binary(), "request", "--name", i.Name)
	if err != nil {
		return nil, err
	}
	r, err := protocol.Decode[protocol.EnrolRequest](bytes.TrimSpace(out))
	if err != nil {
		return nil, fmt.Errorf("its enrolment request: %w", err)
	}
	if r.Name != i.Name || r.Role != i.Program.Role {
		return nil, fmt.Errorf("its enrolment request is for %s %q, not for %s %q", r.Role, r.Name, i.Program.Role, i.Name)
	}
	return &r, nil
}

func (i Installation) start(ctx context.Context, m *Machine) (lasting bool, err error) {
	if _, err := run(ctx, stepTime, m, nil, "test", "-d", machine.PassingUnits); err != nil {
		return false, errors.New("the machine does not run systemd")
	}
	_, err = run(ctx, stepTime, m, nil, "sh", "-c", `[ -d "$1" ] && [ ! -L "$1" ] && [ -w "$1" ]`, "sh", machine.LastingUnits)
	dir := machine.PassingUnits
	if lasting = err == nil; lasting {
		dir = machine.LastingUnits
	}
	deployed, err := i.deployed(ctx, m, dir)
	if err != nil {
		return false, err
	}
	if deployed {
		// Not at once: the agent that is restarted may be what carries this connection.
		_, err := run(ctx, stepTime, m, nil, "systemd-run", "--quiet", "--collect", "--on-active=1s", "systemctl", "restart", i.Program.unit())
		return true, err
	}
	if err := upload(ctx, m, dir+"/"+i.Program.unit(), []byte(i.Program.Unit), "0644"); err != nil {
		return false, err
	}
	commands := [][]string{{"daemon-reload"}, {"enable", i.Program.unit()}, {"restart", "--no-block", i.Program.unit()}}
	if !lasting {
		commands = [][]string{commands[0], commands[2]}
	}
	for _, c := range commands {
		if _, err := run(ctx, stepTime, m, nil, append([]string{"systemctl"}, c...)...); err != nil {
			return false, fmt.Errorf("systemctl %s: %w", c[0], err)
		}
	}
	return lasting, nil
}

// deployed tells whether the machine's own system has the unit: that counts more than one in /run, and runs what a deployment
// brought. The program that was uploaded takes its place with the next one (agent/facts).
func (i Installation) deployed(ctx context.Context, m *Machine, dir string) (bool, error) {
	out, err := run(ctx, stepTime, m, nil, "systemctl", "show", "--property=FragmentPath", "--value", i.Program.unit())
	if err != nil {
		return false, fmt.Errorf("systemctl show: %w", err)
	}
	path := strings.TrimSpace(string(out))
	return path != "" && path != dir+"/"+i.Program.unit(), nil
}

// openScript lets connections to ports through a running NixOS firewall, in both of its forms.
const openScript = `for port; do
  for tables in iptables ip6tables; do
    "$tables" -w -n -L nixos-fw >/dev/null 2>&1 || continue
    "$tables" -w -C nixos-fw -p tcp --dport "$port" -j nixos-fw-accept 2>/dev/null ||
      "$tables" -w -I nixos-fw -p tcp --dport "$port" -j nixos-fw-accept || exit 1
  done
  if nft list chain inet nixos-fw input-allow 2>/dev/null >/dev/null; then
    nft list chain inet nixos-fw input-allow | grep -q "tcp dport $port accept" ||
      nft insert rule inet nixos-fw input-allow tcp dport "$port" accept || exit 1
  fi
done`

// OpenPorts opens TCP ports in the firewall of a machine that runs NixOS, until that is loaded anew: for a controller, whose
// configuration opens them for good, comes through them. Elsewhere it changes nothing.
func OpenPorts(ctx context.Context, m *Machine, ports []int) error {
	argv := []string{"sh", "-c", openScript, "sh"}
	for _, p := range ports {
		argv = append(argv, strconv.Itoa(p))
	}
	if _, err := run(ctx, stepTime, m, nil, argv...); err != nil {
		return fmt.Errorf("open the firewall: %w", err)
	}
	return nil
}

// Log is the end of the program's log on a machine, for when it does not come up.
func Log(ctx context.Context, m *Machine, p Program) []string {
	out, err := run(ctx, stepTime, m, nil, "journalctl", "--no-pager", "-o", "cat", "-n", "20", "-u", p.unit())
	if err != nil {
		return []string{"(no log: " + err.Error() + ")"}
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}
