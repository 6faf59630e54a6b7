//go:build linux

package testos_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// machine is the node that all these tests share, one after the other: each starts from the base system.
type machine struct {
	*lab.Node
	lab  *lab.Lab
	base string
}

// TestSystem runs everything on one node; its parts are in the order of a reader's interest.
func TestSystem(t *testing.T) {
	if err := lab.Available(); err != nil {
		if os.Getenv("CI") == "" {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	l, err := lab.Open(t.Context(), lab.Options{Name: fmt.Sprintf("t%d-testos", os.Getpid()), Log: t.Output(), OwnerPID: os.Getpid()})
	must(t, err)
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	nodes, err := l.Start(t.Context(), "n1")
	must(t, err)
	m := &machine{Node: nodes[0], lab: l}
	m.base = m.sh(t, "readlink /run/current-system")

	for _, part := range []struct {
		name string
		run  func(*testing.T, *machine)
	}{
		{"FirstBoot", testFirstBoot},
		{"Units", testUnits},
		{"Etc", testEtc},
		{"DryActivate", testDryActivate},
		{"FailedUnit", testFailedUnit},
		{"Activation", testActivation},
		{"HungActivation", testHungActivation},
		{"Lock", testLock},
		{"BadConfigurations", testBadConfigurations},
		{"Firewall", testFirewall},
		{"PowerCut", testPowerCut},
		{"Boot", testBoot},
		{"BootMenu", testBootMenu},
		{"Kernel", testKernel},
		{"Packages", testPackages},
		{"Library", testLibrary},
		{"Configurations", testConfigurations},
	} {
		t.Run(part.name, func(t *testing.T) {
			part.run(t, m)
			m.sh(t, m.base+"/bin/switch-to-configuration switch")
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (m *machine) sh(t *testing.T, script string) string {
	t.Helper()
	out, err := m.Exec(t.Context(), "sh", "-c", script)
	must(t, err)
	return strings.TrimSpace(string(out))
}

// build builds a system from the node's own /etc/nixos with this text as n1.nix.
func (m *machine) build(t *testing.T, text string) string {
	t.Helper()
	m.tree(t, text)
	out, err := m.Command(t.Context(), "nix", "build", "--no-link", "--print-out-paths", attribute).Output()
	if err != nil {
		var exit *exec.ExitError
		errors.As(err, &exit)
		t.Fatalf("build: %v\n%s", err, exit.Stderr)
	}
	return strings.TrimSpace(string(out))
}

const attribute = `path:/root/tree#nixosConfigurations."n1".config.system.build.toplevel`

func (m *machine) tree(t *testing.T, text string) {
	t.Helper()
	m.sh(t, "rm -rf /root/tree && cp -r /etc/nixos /root/tree")
	must(t, m.WriteFile("/root/tree/n1.nix", []byte(text), 0o644))
}

// to runs a system's switch-to-configuration and returns what it said and its exit status.
func (m *machine) to(t *testing.T, system, action string) (string, int) {
	t.Helper()
	out, err := m.Exec(t.Context(), system+"/bin/switch-to-configuration", action)
	if err == nil {
		return string(out), 0
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), exit.ExitCode()
}

func (m *machine) ok(t *testing.T, system, action string) string {
	t.Helper()
	out, status := m.to(t, system, action)
	if status != 0 {
		t.Fatalf("%s ended with %d:\n%s", action, status, out)
	}
	return out
}

func (m *machine) current(t *testing.T) string {
	t.Helper()
	return m.sh(t, "readlink /run/current-system")
}

func (m *machine) pid(t *testing.T, unit string) string {
	t.Helper()
	return m.sh(t, "systemctl show --value -p MainPID "+unit)
}

// contains fails the test for each of these that the text lacks.
func contains(t *testing.T, text string, wanted ...string) {
	t.Helper()
	for _, want := range wanted {
		if !strings.Contains(text, want) {
			t.Errorf("this lacks %q:\n%s", want, text)
		}
	}
}

// service is a module's line for a unit that runs until it is stopped.
func service(name, description, more string) string {
	return fmt.Sprintf(`units."%s.service" = { unit.Description = "%s"; service = { Type = "exec"; ExecStart = "/bin/sleep infinity"; }; %s };`,
		name, description, more)
}

func module(lines ...string) string {
	return "{ ... }: {\n" + strings.Join(lines, "\n") + "\n}\n"
}

func testFirstBoot(t *testing.T, m *machine) {
	contains(t, m.sh(t, `readlink /run/booted-system /boot/testos/default; readlink -f /nix/var/nix/profiles/system
		cd /run/current-system; ls; cat system; ls bin; systemctl is-system-running`),
		strings.Repeat(m.base+"\n", 3), "activate", "etc", "init-interface-version", "initrd", "kernel", "kernel-modules",
		"nixos-version", "sw", "x86_64-linux", "switch-to-configuration", "running")
}

func testUnits(t *testing.T, m *machine) {
	first := m.build(t, module(service("same", "same", ""), service("changed", "1", ""), service("kept", "1", "restartIfChanged = false;"),
		service("quick", "1", "stopIfChanged = false;"), service("gone", "gone", ""),
		`units."reloaded.service".text = "[Service]\nExecStart=/bin/sleep infinity\nExecReload=/bin/touch /run/reloaded-1\n[Unit]\nX-ReloadIfChanged=true\n";`,
		`units."idle.service" = { service.ExecStart = "/bin/true"; wantedBy = [ ]; };`))
	contains(t, m.ok(t, first, "switch"), "the following new units were started: changed.service, gone.service, kept.service, quick.service, reloaded.service, same.service")
	names := []string{"same", "changed", "kept", "quick", "reloaded"}
	before := map[string]string{}
	for _, name := range names {
		before[name] = m.pid(t, name)
	}
	if got := m.pid(t, "idle"); got != "0" {
		t.Errorf("idle, which nothing wants, runs as %s", got)
	}

	second := m.build(t, module(service("same", "same", ""), service("changed", "2", ""), service("kept", "2", "restartIfChanged = false;"),
		service("quick", "2", "stopIfChanged = false;"), service("new", "new", ""),
		`units."reloaded.service".text = "[Service]\nExecStart=/bin/sleep infinity\nExecReload=/bin/touch /run/reloaded-2\n[Unit]\nX-ReloadIfChanged=true\n";`))
	contains(t, m.ok(t, second, "test"),
		"stopping the following units: changed.service, gone.service\n",
		"NOT restarting the following changed units: kept.service\n",
		"activating the configuration...\n",
		"reloading the following units: reloaded.service\n",
		"restarting the following units: quick.service\n",
		"starting the following units: changed.service\n",
		"the following new units were started: new.service\n")
	for _, name := range names {
		restarted := before[name] != m.pid(t, name)
		if want := name == "changed" || name == "quick"; restarted != want {
			t.Errorf("%s was restarted: %v", name, restarted)
		}
	}
	if got := m.sh(t, "systemctl is-active gone.service new.service || true"); got != "inactive\nactive" {
		t.Errorf("gone and new are %q", got)
	}
	m.sh(t, "test -e /run/reloaded-2")
	if m.current(t) != second {
		t.Error("the new system is not the current one")
	}
	if out := m.ok(t, second, "test"); strings.Contains(out, "units") {
		t.Errorf("the second time it did something:\n%s", out)
	}
}

func testEtc(t *testing.T, m *machine) {
	first := m.build(t, module(`etc."app/a.conf".text = "a1\n"; etc."app/b.conf" = { text = "b1\n"; mode = "0600"; };`,
		`etc."app/c.conf" = { text = "c1\n"; mode = "0644"; }; infrastructure.hello = { enable = true; message = "it's me"; };`))
	m.ok(t, first, "test")
	if got := m.sh(t, `cd /etc/app; cat a.conf b.conf; stat -c '%a %F' b.conf; systemctl is-active hello`); got != "a1\nb1\n600 regular file\nactive" {
		t.Errorf("files or app: %q", got)
	}
	// The journal has its words a moment after the unit counts as started.
	_, err := m.Exec(t.Context(), "timeout", "30", "bash", "-c", `grep -q -m1 "^it's me$" < <(journalctl -b -o cat -u hello -n all -f)`)
	must(t, err)
	second := m.build(t, module(`etc."app/a.conf".text = "a2\n"; etc."app/c.conf".text = "c2\n";`))
	m.ok(t, second, "test")
	if got := m.sh(t, `cd /etc/app; ls; cat *`); got != "a.conf\nc.conf\na2\nc2" {
		t.Errorf("files: %q", got)
	}
}

func testDryActivate(t *testing.T, m *machine) {
	m.ok(t, m.build(t, module(service("one", "1", ""), service("two", "2", ""), service("kept", "1", "restartIfChanged = false;"))), "test")
	one, current := m.pid(t, "one"), m.current(t)
	next := m.build(t, module(service("one", "changed", ""), service("three", "3", ""), service("kept", "2", "restartIfChanged = false;"), `etc."dry".text = "";`, `activationScript = "touch /run/dry";`))
	contains(t, m.ok(t, next, "dry-activate"), "would stop the following units: one.service, two.service\n",
		"would NOT stop the following changed units: kept.service\n", "would activate the configuration...\n", "would start the following units: one.service, three.service\n")
	if m.pid(t, "one") != one || m.current(t) != current {
		t.Error("it changed something")
	}
	m.sh(t, "systemctl is-active two && ! test -e /etc/dry && ! test -e /run/dry && ! systemctl is-active three")
	if m.sh(t, "readlink /boot/testos/default") != m.base {
		t.Error("it changed the boot default")
	}
}

func testFailedUnit(t *testing.T, m *machine) {
	for name, unit := range map[string]string{
		"exec":    `units."bad.service".service = { Type = "oneshot"; ExecStart = "/bin/false"; };`,
		"restart": `units."bad.service".service = { Type = "notify"; ExecStart = "/bin/false"; Restart = "always"; RestartSec = "1h"; };`,
	} {
		out, status := m.to(t, m.build(t, module(unit)), "test")
		contains(t, out, "warning: the following units failed: bad.service\n")
		if status != 4 {
			t.Errorf("%s: exit status %d", name, status)
		}
		m.ok(t, m.base, "test")
		if got := m.sh(t, "systemctl is-system-running"); got != "running" {
			t.Errorf("%s: going back left the node %s", name, got)
		}
	}
}

func testActivation(t *testing.T, m *machine) {
	system := m.build(t, module(`activationScript = "false\ntouch /run/went-on";`, service("after", "after", "")))
	if out, status := m.to(t, system, "test"); status != 2 {
		t.Errorf("a failed activation script: exit status %d:\n%s", status, out)
	}
	m.sh(t, "test -e /run/went-on && systemctl is-active after")
	for _, action := range []string{"", "swicth"} {
		if out, status := m.to(t, m.base, action); status != 1 || !strings.Contains(out, "Usage:") {
			t.Errorf("%q: %d, %s", action, status, out)
		}
	}
	if out, status := m.to(t, m.base, "check"); status != 0 || out != "" {
		t.Errorf("check: %d, %s", status, out)
	}
}

// hang starts a switch whose activation never ends, in a unit, and returns when it hangs there.
func (m *machine) hang(t *testing.T, text string) {
	t.Helper()
	system := m.build(t, text)
	m.sh(t, "mkfifo /run/hung")
	m.sh(t, "systemd-run --quiet --unit=hanging --collect "+system+"/bin/switch-to-configuration test")
	m.sh(t, "read line </run/hung; rm /run/hung")
}

const hanging = `activationScript = "echo hung >/run/hung; sleep infinity";`

func testHungActivation(t *testing.T, m *machine) {
	old := m.build(t, module(service("app", "1", "")))
	m.ok(t, old, "test")
	m.hang(t, module(service("app", "2", ""), hanging))
	if got := m.sh(t, "systemctl is-active app || true"); got != "inactive" {
		t.Errorf("app, which changes, is %s during activation", got)
	}
	if m.current(t) != old {
		t.Error("the hung system is the current one already")
	}
	m.sh(t, "systemctl stop hanging")
	contains(t, m.ok(t, old, "test"), "starting the following units: app.service\n")
	if got := m.sh(t, "systemctl is-active app; systemctl show -p Description --value app; systemctl is-system-running"); got != "active\n1\nrunning" {
		t.Errorf("app after going back: %q", got)
	}
}

func testLock(t *testing.T, m *machine) {
	m.hang(t, module(hanging))
	if out, status := m.to(t, m.base, "test"); status != 1 || !strings.Contains(out, "Could not acquire lock") {
		t.Errorf("a second one: %d, %s", status, out)
	}
	m.sh(t, "systemctl stop hanging")
	m.ok(t, m.base, "test")
}

func testBadConfigurations(t *testing.T, m *machine) {
	for want, text := range map[string]string{
		"there is no option unts": module(`unts = { };`),
		"no option wnatedBy":      module(`units."a.service".wnatedBy = [ ];`),
		"set to different values": `{ ... }: { imports = [ { kernel = "1"; } { kernel = "2"; } ]; }`,
		"by hand":                 module(`kernel = throw "by hand";`),
		"syntax error":            "{ ... }: {",
		"compiling\n":             module(`buildScript = "echo compiling; exit 3";`),
	} {
		m.tree(t, text)
		if out, err := m.Exec(t.Context(), "nix", "build", "-L", "--no-link", attribute); err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v\n%s", want, err, out)
		}
	}
	m.tree(t, module(`buildScript = "echo step one; echo step two";`))
	out, err := m.Exec(t.Context(), "nix", "build", "-L", "--no-link", attribute)
	must(t, err)
	contains(t, string(out), "step one", "step two", "building the system of n1")
}

func testFirewall(t *testing.T, m *machine) {
	reached := func() bool {
		conn, err := m.lab.Dial(t.Context(), "tcp", m.IP+":22")
		if err != nil {
			return false
		}
		defer conn.Close()
		greeting, _ := bufio.NewReader(conn).ReadString('\n')
		return strings.HasPrefix(greeting, "SSH-")
	}
	if !reached() {
		t.Fatal("not reached to begin with")
	}
	cut := m.build(t, module(`firewall = ''
		table inet filter {
			chain input { type filter hook input priority 0; policy drop; tcp dport 22 reject; }
			chain output { type filter hook output priority 0; policy drop; }
		}
	'';`))
	contains(t, m.ok(t, cut, "test"), "reloading the following units: firewall.service")
	if _, err := m.lab.Command(t.Context(), "timeout", "1", "bash", "-c", "</dev/tcp/"+m.IP+"/22").CombinedOutput(); err == nil {
		t.Error("reached through a firewall that drops everything")
	}
	m.ok(t, m.base, "test")
	if !reached() {
		t.Error("not reached after going back")
	}
}

func testPowerCut(t *testing.T, m *machine) {
	tested := m.build(t, module(service("tested", "tested", ""), `etc."tested".text = "";`))
	m.ok(t, tested, "test")
	m.sh(t, "systemctl is-active tested && test -e /etc/tested")
	must(t, m.Kill(t.Context()))
	must(t, m.Boot(t.Context()))
	if m.current(t) != m.base || m.sh(t, "readlink /run/booted-system") != m.base {
		t.Error("it did not boot the default")
	}
	m.sh(t, "! systemctl is-active tested && ! systemctl cat tested 2>/dev/null && ! test -e /etc/tested")
}

func testBoot(t *testing.T, m *machine) {
	next := m.build(t, module(service("next", "next", ""), `etc."next".text = "";`))
	m.sh(t, "nix-env --profile /nix/var/nix/profiles/system --set "+next)
	m.ok(t, next, "boot")
	if m.current(t) != m.base {
		t.Error("boot activated it")
	}
	m.sh(t, "! systemctl is-active next")
	if got := m.sh(t, "cat /boot/testos/entries/generation-*.conf"); got != m.base+"\n"+next {
		t.Errorf("entries: %q", got)
	}
	must(t, m.Reboot(t.Context()))
	if m.current(t) != next {
		t.Error("it did not boot the default")
	}
	m.sh(t, "systemctl is-active next && test -e /etc/next")
	m.sh(t, "nix-env --profile /nix/var/nix/profiles/system --set "+m.base)
}

// An older generation, picked in the boot menu, boots once.
func testBootMenu(t *testing.T, m *machine) {
	next := m.build(t, module(service("next", "next", "")))
	m.sh(t, "nix-env --profile /nix/var/nix/profiles/system --set "+next)
	m.ok(t, next, "switch")
	m.sh(t, `ln -s "$(cat /boot/testos/entries/generation-1.conf)" /boot/testos/once`)
	must(t, m.Reboot(t.Context()))
	if m.current(t) != m.base || m.sh(t, "readlink /run/booted-system /boot/testos/default") != m.base+"\n"+next {
		t.Error("it did not boot what was picked, or changed the boot default")
	}
	m.sh(t, "! systemctl is-active next && ! systemctl cat next 2>/dev/null")
	must(t, m.Reboot(t.Context()))
	if m.current(t) != next {
		t.Error("it did not boot the default after that")
	}
	m.sh(t, "systemctl is-active next; nix-env --profile /nix/var/nix/profiles/system --set "+m.base)
}

func testKernel(t *testing.T, m *machine) {
	const differ = "for x in kernel initrd kernel-modules; do [ $(readlink -f /run/booted-system/$x) = $(readlink -f %s/$x) ] || echo $x; done"
	m.ok(t, m.base, "boot")
	must(t, m.Reboot(t.Context()))
	same := m.build(t, module(service("any", "any", "")))
	if got := m.sh(t, fmt.Sprintf(differ, same)); got != "" {
		t.Errorf("with the same kernel these differ: %s", got)
	}
	other := m.build(t, module(`kernel = "6.99.1";`))
	if got := m.sh(t, fmt.Sprintf(differ, other)); got != "kernel\ninitrd\nkernel-modules" {
		t.Errorf("with another kernel these differ: %q", got)
	}
}

// Packages have names and versions, which tools that compare closures go by.
func testPackages(t *testing.T, m *machine) {
	with := func(version string) string {
		return m.build(t, `{ testos, ... }: { packages = [ (testos.run "app-`+version+`" "mkdir -p $out/bin; echo echo `+version+` >$out/bin/app; chmod 555 $out/bin/app") ]; }`)
	}
	first, second := with("1.2"), with("1.10")
	m.ok(t, first, "test")
	if got := m.sh(t, "/run/current-system/sw/bin/app"); got != "1.2" {
		t.Errorf("app says %q", got)
	}
	contains(t, m.sh(t, "nix store diff-closures "+first+" "+second), "app: 1.2 → 1.10")
}
