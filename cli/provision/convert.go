package provision

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/nix-infra/nix-infra/cli/project"
)

// Conversion is how machines become NixOS machines.
type Conversion struct {
	Method   project.Method
	Missing  error  // why there is no script or program for it; nil where nothing is
	Version  string // of NixOS, such as 25.11
	Script   []byte // MethodInfect: run by bash as root
	Mutation bool   // the script is another way: it takes --apply, and leaves the reboot to the machine's owner
	Hetzner  bool   // the machine is one of Hetzner's, which the script is told

	// MethodAnywhere: installs over the machine from here, and returns the last lines of its log with an error.
	Anywhere func(ctx context.Context, t Target, node string) ([]string, error)
}

// The conversion on the machine: a unit, so that it goes on when the connection is gone, and the next run finds it.
const (
	convertUnit = "nix-infra-convert.service"
	convertDir  = "/var/lib/nix-infra-convert"
	convertLog  = convertDir + "/log"
	convertFile = convertDir + "/script"
)

const (
	convertTime  = time.Hour // for a machine that downloads a system on a slow line
	convertTries = 2         // downloads fail at times, and the script may be run again
	logLines     = 12
)

// losable tells why a machine would be out of reach once the script has converted it: there, NixOS lets in at port 22, and has
// the address that DHCP gives it, or the one that the script found on the first interface.
func (a *Arrival) losable(f Facts) error {
	ports, at := strings.Fields(f.SSHPorts), fmt.Sprint(a.Ways[0].Port)
	switch {
	case len(ports) > 0 && !slices.Contains(ports, "22") || at != "22" && slices.Contains(ports, at):
		return fmt.Errorf("its sshd listens at port %s, and after the conversion at 22 only: have it listen at 22 now, too, and reach it there (nodes.%s.ssh in %s)",
			strings.Join(ports, " and "), a.Name, project.SettingsFile)
	case f.FixedOn != "" && !f.FixedFirst:
		return fmt.Errorf("its address on %s is not from DHCP, and the conversion script can keep only one of the first network interface: use --method nixos-anywhere, or --mutation with a script of yours", f.FixedOn)
	}
	return nil
}

// readyScript makes the machine ready for the script, in the folder $1. What earlier tries left there goes; /boot is there again,
// which a script that failed late has moved away; and a configuration that an earlier try wrote is written anew, as that may
// lack the key. One that the machine's owner wrote beforehand is the script's to keep.
//
// Then it keeps the ways in: the script lets root in with the keys that root has, or else with those of the user who
// sudoed. $2 is that user, $3 the key that we came with.
const readyScript = `umask 077
mkdir -p "$1"
[ -d /boot/ ] || mkdir -m 0755 /boot/
if [ ! -e /etc/nixos/configuration.nix ]; then
  touch "$1/writes-configuration"
elif [ -e "$1/writes-configuration" ]; then
  rm -f /etc/nixos/configuration.nix /etc/nixos/hardware-configuration.nix /etc/nixos/networking.nix
fi
rm -f "$1/log"
mkdir -p /root/.ssh
file=/root/.ssh/authorized_keys
if [ ! -s "$file" ]; then
  cat "$(getent passwd "$2" | cut -d: -f6)/.ssh/authorized_keys" >"$file" 2>/dev/null || true
fi
touch "$file"
while read -r line; do
  case $line in "$3"*) exit 0 ;; esac
done <"$file"
[ -z "$(tail -c 1 "$file")" ] || echo >>"$file"
printf '%s\n' "$3" >>"$file"`

// infect runs the script, or waits for one that runs already, and gives the connection on which it saw the end.
func (a *Arrival) infect(ctx context.Context, m *Machine, before Facts) (*Machine, error) {
	for try := 1; ; try++ {
		state, err := conversionOf(ctx, m)
		switch {
		case err != nil:
		case state.running():
			a.Step(PhaseConvert, "the conversion is under way")
		case !state.succeeded():
			err = a.startConversion(ctx, m, before)
		}
		if err == nil {
			m, err = a.followConversion(ctx, m)
		}
		var failed *failedConversion
		switch {
		case err == nil && a.Conversion.Mutation:
			m.Close()
			return nil, a.Fail(ctx, ErrOwnReboot, nil)
		case err == nil:
			return m, nil
		case errors.As(err, &failed) && try < convertTries && ctx.Err() == nil:
			a.Step(PhaseConvert, fmt.Sprintf("the script ended with %s; try again", failed.how))
			continue
		}
		var log []string
		if m != nil {
			log = conversionLog(ctx, m)
			m.Close()
		}
		return nil, a.Fail(ctx, err, log)
	}
}

func (a *Arrival) startConversion(ctx context.Context, m *Machine, f Facts) error {
	key := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(m.UserKey)))
	if _, err := run(ctx, stepTime, m, nil, "sh", "-euc", readyScript, "sh", convertDir, m.user, key); err != nil {
		return fmt.Errorf("make it ready for the conversion: %w", err)
	}
	if err := upload(ctx, m, convertFile, a.Conversion.Script, "0700"); err != nil {
		return err
	}
	_, _ = run(ctx, stepTime, m, nil, "systemctl", "reset-failed", convertUnit) // of an earlier try; fails where there is none
	argv := []string{"systemd-run", "--quiet", "--unit=" + convertUnit, "--description=conversion to NixOS",
		"--property=Type=exec", "--property=RemainAfterExit=yes", "--property=StandardOutput=append:" + convertLog}
	for _, v := range a.environment(f, m.user) {
		argv = append(argv, "--setenv="+v)
	}
	argv = append(argv, "/bin/bash", convertFile)
	if a.Conversion.Mutation {
		argv = append(argv, "--apply")
	}
	if _, err := run(ctx, stepTime, m, nil, argv...); err != nil {
		return err
	}
	a.Step(PhaseConvert, "the conversion script runs")
	return nil
}

// environment is what the script is told about the machine, and the user who sudoes.
func (a *Arrival) environment(f Facts, user string) []string {
	c := a.Conversion
	all := []string{"HOME=/root", "USER=root", "NIX_CHANNEL=nixos-" + c.Version}
	all = append(all, "bootFs=/boot") // where there is EFI, the script finds that out; elsewhere it needs it, and forgets to set it
	if user != "root" {
		all = append(all, "SUDO_USER="+user)
	}
	if c.Hetzner {
		all = append(all, "PROVIDER=hetznercloud")
	} else if f.FixedOn != "" {
		all = append(all, "doNetConf=y") // the network is written down as it is, else DHCP is asked
	}
	if f.TmpMemory {
		all = append(all, "NO_SWAP=1") // it would swap to a file in /tmp
	}
	if !c.Mutation {
		all = append(all, "NO_REBOOT=1")
	}
	return all
}

// conversion is how the unit is.
type conversion struct {
	active, sub, result, status string
	line                        string // the last of the log
}

func (c conversion) running() bool {
	return c.active == "activating" || c.active == "active" && c.sub != "exited"
}
func (c conversion) succeeded() bool { return c.active == "active" && c.sub == "exited" }

// lookAtConversion prints the state of the unit, and the last line of its log.
const lookAtConversion = `systemctl show -p ActiveState,SubState,Result,ExecMainStatus "$1" || exit 1
echo "log=$(tail -n 1 "$2" 2>/dev/null)"`

func conversionOf(ctx context.Context, m *Machine) (conversion, error) {
	out, err := run(ctx, pollTime, m, nil, "sh", "-c", lookAtConversion, "sh", convertUnit, convertLog)
	if err != nil {
		return conversion{}, err
	}
	var c conversion
	for line := range strings.Lines(string(out)) {
		key, value, _ := strings.Cut(strings.TrimRight(line, "\r\n"), "=")
		switch key {
		case "ActiveState":
			c.active = value
		case "SubState":
			c.sub = value
		case "Result":
			c.result = value
		case "ExecMainStatus":
			c.status = value
		case "log":
			c.line = value
		}
	}
	return c, nil
}

// failedConversion is a script that did not do it.
type failedConversion struct{ how string }

func (e *failedConversion) Error() string {
	return "the conversion script ended with " + e.how + "; all that it said is on the machine, in " + convertLog
}

// pollTime is how long one look at the conversion may take before the connection counts as lost.
const pollTime = 20 * time.Second

// followConversion waits for the end of the script, over as many connections as it takes. The one that it gives is open,
// or nil with an error.
func (a *Arrival) followConversion(ctx context.Context, m *Machine) (*Machine, error) {
	limit, cancel := context.WithTimeoutCause(ctx, convertTime, fmt.Errorf("the conversion took longer than %s; it may go on", convertTime))
	defer cancel()
	said := ""
	for {
		c, err := conversionOf(ctx, m)
		switch {
		case ctx.Err() != nil:
			return m, context.Cause(ctx)
		case limit.Err() != nil:
			return m, context.Cause(limit)
		case err != nil:
			m.Close()
			if m, err = a.reach(limit, Patience{freshTime, keysTime}); err != nil {
				return nil, err
			}
			continue
		case c.succeeded():
			return m, nil
		case !c.running() && c.active == "inactive":
			return m, &failedConversion{"a reboot of the machine"}
		case !c.running():
			return m, &failedConversion{c.result + " (" + c.status + ")"}
		}
		if c.line != said && c.line != "" {
			said = c.line
			a.Log(tail(said, 1)[0])
		}
		if err := pause(limit, retryEvery); err != nil {
			return m, err
		}
	}
}

// conversionLog is the end of the script's log.
func conversionLog(ctx context.Context, m *Machine) []string {
	out, err := run(ctx, pollTime, m, nil, "tail", "-n", fmt.Sprint(logLines), convertLog)
	if err != nil {
		return []string{"(no log: " + err.Error() + ")"}
	}
	return tail(string(out), logLines)
}
