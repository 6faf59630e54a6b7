package provision

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision/sshtest"
)

const debian12 = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nNAME=\"Debian GNU/Linux\"\nID=debian\n"

// arrival is one of a machine that admin may log in to, and its script's text.
func arrival(t *testing.T, h *sshtest.Host, script string) (*Arrival, *[]string) {
	tg := target(t, h, "admin")
	root := tg
	root.User = "root"
	j, err := OpenJournal(t.TempDir(), "web1")
	if err != nil {
		t.Fatal(err)
	}
	steps := &[]string{}
	return &Arrival{
		Name: "web1", Ways: []Target{tg, root}, Journal: j,
		Conversion: Conversion{Method: project.MethodInfect, Version: "25.11", Script: []byte(script)},
		Step:       func(p Phase, what string) { *steps = append(*steps, string(p)+" "+what) },
		Log:        func(line string) { *steps = append(*steps, "convert log: "+line) },
	}, steps
}

// phases are those of steps, each once in a row.
func phases(steps []string) []string {
	var all []string
	for _, s := range steps {
		p, _, _ := strings.Cut(s, " ")
		all = append(all, p)
	}
	return slices.Compact(all)
}

const becomesNixOS = `echo "fetching $NIX_CHANNEL for $SUDO_USER, reboot ${NO_REBOOT:+no}"; touch "$FAKE_ROOT/nixos"`

func TestArrivalConverts(t *testing.T) {
	h := sshtest.Start(t)
	h.Runs(t, debian12)
	a, steps := arrival(t, h, becomesNixOS)
	m, err := a.NixOS(t.Context())
	if err != nil {
		t.Fatalf("%v\n%s", err, strings.Join(*steps, "\n"))
	}
	defer m.Close()
	if want := []string{"reach", "look", "convert", "reboot", "verify"}; !slices.Equal(phases(*steps), want) {
		t.Errorf("the phases were %v, want %v", phases(*steps), want)
	}
	log, err := os.ReadFile(h.Path("/var/lib/nix-infra-convert/log"))
	if err != nil || string(log) != "fetching nixos-25.11 for admin, reboot no\n" {
		t.Errorf("the script said %q, %v", log, err)
	}
	keys, err := os.ReadFile(h.Path("/root/.ssh/authorized_keys"))
	if err != nil || !strings.HasPrefix(string(keys), "ssh-ed25519 ") || strings.Count(string(keys), "\n") != 1 {
		t.Errorf("root is let in by %q, %v", keys, err)
	}
	if facts, err := Look(t.Context(), m); err != nil || !facts.NixOS {
		t.Errorf("it is %+v, %v", facts, err)
	}
}

// The script is told what it can't find out, or would do wrong.
func TestScriptIsTold(t *testing.T) {
	const always = "HOME=/root USER=root NIX_CHANNEL=nixos-25.11 bootFs=/boot SUDO_USER=admin"
	for name, c := range map[string]struct {
		change func(t *testing.T, h *sshtest.Host, a *Arrival)
		want   string
	}{
		"by DHCP":         {func(t *testing.T, h *sshtest.Host, a *Arrival) { h.ListensAt(t, "22") }, always + " NO_REBOOT=1"},
		"a fixed address": {func(t *testing.T, h *sshtest.Host, a *Arrival) { h.FixedAddress(t, "ens18", 2) }, always + " doNetConf=y NO_REBOOT=1"},
		"Hetzner's": {func(t *testing.T, h *sshtest.Host, a *Arrival) {
			h.FixedAddress(t, "eth0", 2)
			a.Conversion.Hetzner = true
		}, always + " PROVIDER=hetznercloud NO_REBOOT=1"},
		"/tmp in memory": {func(t *testing.T, h *sshtest.Host, a *Arrival) { h.TmpInMemory(t) }, always + " NO_SWAP=1 NO_REBOOT=1"},
	} {
		t.Run(name, func(t *testing.T) {
			h := sshtest.Start(t)
			h.Runs(t, debian12)
			a, _ := arrival(t, h, becomesNixOS)
			c.change(t, h, a)
			m, err := a.NixOS(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			m.Close()
			var told []string
			for _, word := range strings.Fields(h.Asked()[0]) {
				if v, ok := strings.CutPrefix(word, "--setenv="); ok {
					told = append(told, v)
				}
			}
			if got := strings.ReplaceAll(strings.Join(told, " "), h.Path("/"), "/"); got != c.want {
				t.Errorf("it was told %s, not %s", got, c.want)
			}
		})
	}
}

// A configuration that a try of the script wrote is written anew by the next, which may come with another key; one that was there
// before stays. What a late failure moved away is there again.
func TestNextTry(t *testing.T) {
	const script = `[ -d "$FAKE_ROOT/boot" ] || exit 8; rmdir "$FAKE_ROOT/boot"
file=$FAKE_ROOT/etc/nixos/configuration.nix; mkdir -p "$FAKE_ROOT/etc/nixos"; [ -e "$file" ] || echo "of try $(wc -l <"$FAKE_ROOT/unit/asked")" >"$file"; exit 7`
	for owners, want := range map[string]string{"": "of try 2\n", "mine\n": "mine\n"} {
		h := sshtest.Start(t)
		h.Runs(t, debian12)
		file := h.Path("/etc/nixos/configuration.nix")
		if owners != "" {
			if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(owners), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		a, _ := arrival(t, h, script)
		if _, err := a.NixOS(t.Context()); err == nil || !strings.Contains(err.Error(), "ended with exit-code (7)") {
			t.Errorf("got %v", err)
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != want {
			t.Errorf("after two tries it is %q, %v; want %q", got, err, want)
		}
	}
}

// A machine that runs NixOS is taken as it is, whatever the method.
func TestArrivalOfNixOS(t *testing.T) {
	for _, method := range project.Methods {
		h := sshtest.Start(t)
		h.Runs(t, "ID=nixos\n")
		h.NixOS(t)
		a, steps := arrival(t, h, "exit 1")
		a.Conversion.Method, a.Conversion.Missing = method, errors.New("no script")
		m, err := a.NixOS(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		m.Close()
		if want := []string{"reach", "look"}; !slices.Equal(phases(*steps), want) {
			t.Errorf("%s: the phases were %v, want %v", method, phases(*steps), want)
		}
	}
}

func TestArrivalRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		change func(t *testing.T, h *sshtest.Host, a *Arrival)
		want   string
	}{
		"another distribution": {func(t *testing.T, h *sshtest.Host, a *Arrival) { h.Runs(t, "PRETTY_NAME='Fedora 41'\nID=fedora\n") }, "look: it runs Fedora 41; machines with NixOS, Debian, or what is made of Debian"},
		"an installer": {func(t *testing.T, h *sshtest.Host, a *Arrival) {
			h.Runs(t, "PRETTY_NAME=NixOS\nID=nixos\nVARIANT_ID=installer\n")
			h.NixOS(t)
		}, "look: it runs NixOS; machines with"},
		"method none": {func(t *testing.T, h *sshtest.Host, a *Arrival) { a.Conversion.Method = project.MethodNone }, "look: it runs Debian GNU/Linux 12 (bookworm), and method none converts nothing"},
		"no script": {func(t *testing.T, h *sshtest.Host, a *Arrival) {
			a.Conversion.Missing = errors.New("run nix-infra init --fetch")
		}, "look: run nix-infra init --fetch"},
		"another type":    {func(t *testing.T, h *sshtest.Host, a *Arrival) { h.Uname = "Linux riscv64" }, `look: it is of type "riscv64"`},
		"sudo asks":       {func(t *testing.T, h *sshtest.Host, a *Arrival) { h.NoSudo(t, "sudo: a password is required") }, "look: sudo asks admin for a password"},
		"may not sudo":    {func(t *testing.T, h *sshtest.Host, a *Arrival) { h.NoSudo(t, "admin is not in the sudoers file.") }, "look: sudo does not let admin become root"},
		"there's no sudo": {func(t *testing.T, h *sshtest.Host, a *Arrival) { h.NoSudo(t, "sh: 1: sudo: not found") }, "look: admin is not root, and there is no sudo"},
		"sshd elsewhere":  {func(t *testing.T, h *sshtest.Host, a *Arrival) { h.ListensAt(t, "2222") }, "look: its sshd listens at port 2222, and after the conversion at 22 only"},
		"reached elsewhere": {func(t *testing.T, h *sshtest.Host, a *Arrival) {
			h.ListensAt(t, "22", strconv.Itoa(a.Ways[0].Port))
		}, "look: its sshd listens at port 22 and "},
		"a fixed address": {func(t *testing.T, h *sshtest.Host, a *Arrival) { h.FixedAddress(t, "br0", 4) }, "look: its address on br0 is not from DHCP"},
		"no key":          {func(t *testing.T, h *sshtest.Host, a *Arrival) { h.LetOnly("eve") }, "reach: admin@"},
	} {
		t.Run(name, func(t *testing.T) {
			h := sshtest.Start(t)
			h.Runs(t, debian12)
			a, _ := arrival(t, h, becomesNixOS)
			c.change(t, h, a)
			_, err := a.NixOS(t.Context())
			if err == nil || !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			again, err := OpenJournal(filepath.Dir(a.Journal.file), "web1")
			if err != nil || !strings.HasPrefix(string(again.Phase)+": "+again.Error, c.want) {
				t.Errorf("the journal has %+v, %v", again, err)
			}
			if _, err := os.Stat(h.Path("/unit/asked")); err == nil {
				t.Error("something was run on it")
			}
		})
	}
}

// The script fails; that is tried once more, and then told with the end of its log. The next run does it anew.
func TestArrivalTellsWhatFailed(t *testing.T) {
	h := sshtest.Start(t)
	h.Runs(t, debian12)
	a, steps := arrival(t, h, `echo "no space left"; exit 7`)
	_, err := a.NixOS(t.Context())
	var failed *PhaseError
	if !errors.As(err, &failed) || failed.Phase != PhaseConvert || !slices.Equal(failed.Log, []string{"no space left"}) ||
		!strings.Contains(err.Error(), "convert: the conversion script ended with exit-code (7)") {
		t.Fatalf("got %v (%+v)", err, failed)
	}
	if len(h.Asked()) != 2 {
		t.Errorf("it was run %d times:\n%s", len(h.Asked()), strings.Join(*steps, "\n"))
	}
	a.Conversion.Script = []byte(becomesNixOS)
	m, err := a.NixOS(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
}

// A script that does not make it NixOS is found out after the reboot.
func TestArrivalThatStaysWhatItWas(t *testing.T) {
	h := sshtest.Start(t)
	h.Runs(t, debian12)
	a, _ := arrival(t, h, `echo all is well`)
	_, err := a.NixOS(t.Context())
	var failed *PhaseError
	if !errors.As(err, &failed) || failed.Phase != PhaseVerify || !slices.Equal(failed.Log, []string{"all is well"}) {
		t.Fatalf("got %v (%+v)", err, failed)
	}
}

// A run that was ended while the script ran is finished by the next, which waits for that script.
func TestArrivalGoesOn(t *testing.T) {
	h := sshtest.Start(t)
	h.Runs(t, debian12)
	a, _ := arrival(t, h, `touch "$FAKE_ROOT/runs"; while [ ! -e "$FAKE_ROOT/go" ] && [ ! -e "$FAKE_ROOT/off" ]; do sleep 0.05; done; `+becomesNixOS)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for t.Context().Err() == nil {
			if _, err := os.Stat(h.Path("/runs")); err == nil {
				cancel()
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	if _, err := a.NixOS(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	a.Step = func(p Phase, what string) {
		if what == "the conversion is under way" {
			os.WriteFile(h.Path("/go"), nil, 0o600)
		}
	}
	m, err := a.NixOS(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
	if len(h.Asked()) != 1 {
		t.Errorf("it was run %d times", len(h.Asked()))
	}
}

// A run that was ended while the machine boots is finished by the next, which gives it the time that a first boot takes.
func TestArrivalWhileItBoots(t *testing.T) {
	h := sshtest.Start(t)
	h.Runs(t, debian12)
	h.NixOS(t)
	c := newCable(t, h.Address) // not plugged in
	a, _ := arrival(t, h, becomesNixOS)
	away, err := ParseTarget("admin@" + c.address)
	if err != nil {
		t.Fatal(err)
	}
	for i := range a.Ways {
		a.Ways[i].Port = away.Port
	}
	a.Journal.Phase = PhaseReboot
	for range 2 { // two runs that are ended while they wait
		ctx, cancel := context.WithCancel(t.Context())
		a.Step = func(p Phase, what string) {
			if strings.HasPrefix(what, "wait: ") {
				cancel()
			}
		}
		if _, err := a.NixOS(ctx); !errors.Is(err, context.Canceled) || a.Journal.Phase != PhaseReboot {
			t.Fatalf("in phase %s: %v", a.Journal.Phase, err)
		}
	}
	h.LetOnly("nobody") // until it has booted
	refused := false
	a.Step = func(p Phase, what string) {
		if refused {
			h.LetOnly("root")
		}
		refused = refused || strings.Contains(what, "does not accept any of the keys")
		c.up.Store(true)
	}
	m, err := a.NixOS(t.Context())
	if err != nil || !refused {
		t.Fatalf("refused at first: %v; %v", refused, err)
	}
	m.Close()
}

// The command that boots a machine may go down with it.
func TestRebootThatIsKilled(t *testing.T) {
	h := sshtest.Start(t)
	h.Runs(t, debian12)
	h.DiesOfReboot()
	a, steps := arrival(t, h, becomesNixOS)
	m, err := a.NixOS(t.Context())
	if err != nil {
		t.Fatalf("%v\n%s", err, strings.Join(*steps, "\n"))
	}
	m.Close()
}

// Another way of conversion leaves the reboot to the owner; the run after that takes the machine as it is.
func TestMutation(t *testing.T) {
	h := sshtest.Start(t)
	h.Runs(t, debian12)
	a, _ := arrival(t, h, `[ "$1" = --apply ] && [ -z "$NO_REBOOT" ] && touch "$FAKE_ROOT/nixos"`)
	a.Conversion.Mutation = true
	for range 2 {
		if _, err := a.NixOS(t.Context()); !errors.Is(err, ErrOwnReboot) {
			t.Fatalf("got %v", err)
		}
	}
	if len(h.Asked()) != 1 {
		t.Errorf("it was run %d times", len(h.Asked()))
	}
	h.NixOS(t)
	m, err := a.NixOS(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
}

// After the reboot there may be nobody but root, and another machine may answer.
func TestArrivalAfterReboot(t *testing.T) {
	for name, changed := range map[string]bool{"only root": false, "another host key": true} {
		t.Run(name, func(t *testing.T) {
			h := sshtest.Start(t)
			h.Runs(t, debian12)
			a, _ := arrival(t, h, becomesNixOS)
			step := a.Step
			a.Step = func(p Phase, what string) {
				if step(p, what); p == PhaseReboot {
					h.LetOnly("root")
					if changed {
						h.ChangeHostKey(t)
					}
				}
			}
			m, err := a.NixOS(t.Context())
			if changed {
				var failed *PhaseError
				if !errors.As(err, &failed) || failed.Phase != PhaseReboot || !strings.Contains(err.Error(), "another host key") {
					t.Fatalf("got %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			m.Close()
		})
	}
}

func TestJournal(t *testing.T) {
	dir := t.TempDir()
	j, err := OpenJournal(dir, "web1")
	if err != nil {
		t.Fatal(err)
	}
	j.Phase, j.Controller, j.Log = PhaseConvert, true, []string{"a line"}
	if err := j.Save(); err != nil {
		t.Fatal(err)
	}
	again, err := OpenJournal(dir, "web1")
	if err != nil || again.Phase != PhaseConvert || !again.Controller || !slices.Equal(again.Log, j.Log) {
		t.Errorf("read %+v, %v", again, err)
	}
	for _, other := range []string{".web1.json.tmp-12", "web10.json"} { // of a write that was killed, and of another machine
		if err := os.WriteFile(filepath.Join(dir, other), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(j.Remove(), j.Remove()); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 || left[0].Name() != "web10.json" {
		t.Errorf("left are %v", left)
	}
	for text, want := range map[string]string{"{": "is damaged", `{"v":9}`: "version 9", "": "is damaged"} {
		if err := os.WriteFile(j.file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenJournal(dir, "web1"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestParseFacts(t *testing.T) {
	const rest = "\nuid=0\nuname=Linux aarch64\nboot=0123456789abcdef0123456789abcdef\nsystemd=1\n"
	for text, want := range map[string]Facts{
		"ID=debian":                                       {Debian: true},
		"ID=ubuntu\nID_LIKE=debian":                       {Debian: true},
		"ID=linuxmint\nID_LIKE=\"ubuntu debian\"":         {Debian: true},
		"ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"":    {},
		"ID=nixos\nnixos=1":                               {NixOS: true},
		"ID=debian\nnixos=1":                              {NixOS: true},
		"ports=22 2222 \nfixed=eth0\nindex=2\ntmp=memory": {SSHPorts: "22 2222", FixedOn: "eth0", FixedFirst: true, TmpMemory: true},
		"fixed=br0\nindex=12":                             {FixedOn: "br0"},
	} {
		want.Arch, want.BootID = "aarch64", "0123456789abcdef0123456789abcdef"
		if got, err := parseFacts(text + rest); err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, want)
		}
	}
	for change, want := range map[string]string{"uid=0": "don't run as root", "uname=Linux": "a Linux machine with systemd", "systemd=1": "a Linux machine with systemd", "aarch64": "of type", "boot=": "boot id"} {
		if _, err := parseFacts(strings.Replace(rest, change, "x=", 1)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("without %s: %v", change, err)
		}
	}
}

func FuzzFacts(f *testing.F) {
	f.Add("uid=0\nID='debian'\nboot=\n==\n")
	f.Fuzz(func(t *testing.T, text string) {
		facts, err := parseFacts(text)
		if err == nil && (facts.NixOS && facts.Debian || !bootIDForm.MatchString(facts.BootID)) {
			t.Errorf("%q: %+v", text, facts)
		}
	})
}
