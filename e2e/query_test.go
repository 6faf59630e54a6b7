//go:build linux

package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// documents runs the CLI with --json and reads what it prints.
func (f *fleet) documents(args ...string) []map[string]any {
	f.t.Helper()
	return readDocuments(f.t, f.must(append(args, "--json")...).out)
}

func readDocuments(t *testing.T, out string) []map[string]any {
	t.Helper()
	var all []map[string]any
	for line := range strings.Lines(out) {
		var d map[string]any
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all = append(all, d)
	}
	return all
}

// field is one field of all documents, in their order.
func field(documents []map[string]any, name string) []string {
	all := []string{}
	for _, d := range documents {
		all = append(all, fmt.Sprint(d[name]))
	}
	return all
}

// property is what systemctl says of a unit.
func (f *fleet) property(n *lab.Node, unit, name string) string {
	f.t.Helper()
	return f.exec(n, "systemctl", "show", "--value", "-p", name, unit)
}

// TestQueries: what the CLI says of a node is what systemctl, journalctl, /proc and the file system say on it.
func TestQueries(t *testing.T) {
	f := newFleet(t, "n1")
	node := f.nodes["n1"]
	f.write("nodes/n1.nix", service("asked", `etc."nix-infra/policy.json".text = builtins.toJSON { v = 1; files.roots = [ "/srv/app" ]; };
  units."asked.socket".socket = { ListenStream = "127.0.0.1:7777"; Accept = true; };
  units."asked@.service".service = { ExecStart = "-/bin/cat"; StandardInput = "socket"; };`))
	f.must("deploy", "n1", "--timeout", "60s", "--settle", "1s")
	f.exec(node, "systemd-run", "--unit=broken", "/bin/sh", "-c", "exit 7")
	f.eventually(soon, func() string {
		if state := f.property(node, "broken.service", "ActiveState"); state != "failed" {
			return "broken.service is " + state
		}
		return ""
	})
	f.exec(node, "systemd-run", "--unit=later", "--on-active=3600", "/bin/true")

	t.Run("units", func(t *testing.T) { f.as(t).queryUnits(node) })
	t.Run("logs", func(t *testing.T) { f.as(t).queryLogs(node) })
	t.Run("stats", func(t *testing.T) { f.as(t).queryStats(node) })
	t.Run("files", func(t *testing.T) { f.as(t).queryFiles(node) })
	t.Run("facts", func(t *testing.T) {
		f := f.as(t)
		d := f.documents("facts", "n1")[0]
		if want := f.exec(node, "uname", "-r"); d["kernel"] != want || d["closure"] != f.running(node) || d["boot_id"] != f.exec(node, "cat", "/proc/sys/kernel/random/boot_id") {
			t.Errorf("%v, and the kernel is %s", d, want)
		}
	})
	t.Run("memory", func(t *testing.T) {
		f := f.as(t)
		// What questions took is given back.
		pid := f.property(node, "nix-infra-agent.service", "MainPID")
		f.eventually(soon, func() string {
			line := f.exec(node, "grep", "VmRSS", "/proc/"+pid+"/status")
			if kib, _ := strconv.Atoi(strings.Fields(line)[1]); kib > 12<<10 {
				return "the agent has " + line
			}
			return ""
		})
	})
}

func (f *fleet) queryUnits(node *lab.Node) {
	t := f.t
	// Units come and go: the two lists have to agree once.
	f.eventually(soon, func() string {
		var want []string
		for line := range strings.Lines(f.exec(node, "systemctl", "list-units", "--all", "--plain", "--no-legend", "--no-pager", "--full")) {
			if w := strings.Fields(line); len(w) >= 4 {
				want = append(want, strings.Join(w[:4], " "))
			}
		}
		var got []string
		for _, d := range f.documents("units", "n1") {
			got = append(got, fmt.Sprintf("%v %v %v %v", d["name"], d["load"], d["active"], d["sub"]))
		}
		slices.Sort(want)
		if slices.Equal(got, want) {
			return ""
		}
		for _, u := range want {
			if !slices.Contains(got, u) {
				return fmt.Sprintf("%d units, systemctl has %d, and %q among them", len(got), len(want), u)
			}
		}
		return fmt.Sprintf("%d units, systemctl has %d", len(got), len(want))
	})
	if got := field(f.documents("units", "n1", "--failed", "--pattern", "bro*"), "name"); fmt.Sprint(got) != "[broken.service]" {
		t.Errorf("failed: %v", got)
	}
	page := f.documents("units", "n1", "--limit", "3")
	next := f.documents("units", "n1", "--limit", "1", "--after", fmt.Sprint(page[3]["next"]))
	if len(page) != 4 || page[3]["cut"] != true || page[3]["next"] != page[2]["name"] || fmt.Sprint(next[0]["name"]) <= fmt.Sprint(page[2]["name"]) {
		t.Errorf("a page: %v, and the next: %v", page, next)
	}

	d := f.documents("unit", "hello", "n1")[0]
	for name, is := range map[string]string{"ActiveState": "active", "SubState": "sub", "MainPID": "pid", "FragmentPath": "file", "Description": "description", "UnitFileState": "state", "Result": "result"} {
		if want := f.property(node, "hello.service", name); fmt.Sprint(d[is]) != want {
			t.Errorf("hello.service: %s is %v, and systemctl says %s", is, d[is], want)
		}
	}
	dependencies, _ := d["dependencies"].(map[string]any)
	for _, word := range []string{"Requires", "WantedBy", "After", "Before"} {
		want := strings.Fields(f.property(node, "hello.service", word))
		slices.Sort(want)
		got := strings.Fields(strings.Trim(fmt.Sprint(dependencies[word]), "[]"))
		if dependencies[word] == nil {
			got = nil
		}
		if !slices.Equal(got, want) && len(got)+len(want) > 0 {
			t.Errorf("%s: %v, and systemctl says %v", word, got, want)
		}
	}
	if log := fmt.Sprint(d["log"]); !strings.Contains(log, "asked") {
		t.Errorf("its log: %s", log)
	}
	if b := f.documents("unit", "broken", "n1")[0]; b["active"] != "failed" || b["result"] != "exit-code" || b["exit_code"] != 7.0 {
		t.Errorf("broken.service: %v", b)
	}
	timer := f.documents("unit", "later.timer", "n1", "--lines", "0")[0]
	timers, _ := timer["timers"].([]any)
	if len(timers) != 1 {
		t.Fatalf("later.timer: %v", timer)
	}
	at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(timers[0].(map[string]any)["next"]))
	if left := time.Until(at); err != nil || left < 50*time.Minute || left > time.Hour+time.Minute {
		t.Errorf("it elapses in %v: %v", left, timers)
	}
	socket := f.documents("unit", "asked.socket", "n1", "--lines", "0")[0]
	if !strings.Contains(fmt.Sprint(socket["sockets"]), "Stream 127.0.0.1:7777") {
		t.Errorf("asked.socket: %v", socket)
	}
	if r := f.cli("unit", "nothing-like-this", "n1"); r.code != 1 || !strings.Contains(r.errOut, "there is no unit nothing-like-this.service") {
		t.Errorf("%v", r)
	}
}

func (f *fleet) queryLogs(node *lab.Node) {
	t := f.t
	// Each is awaited, so that the journal gives each a time of its own.
	const say = `for i in 1 2 3 4 5 6 7 8 9; do echo "<$((i % 8))>line $i of the test" | systemd-cat -t asked-test; journalctl --sync; done`
	f.exec(node, "sh", "-c", say+`; printf 'with\033[31m colour' | systemd-cat -t asked-test; journalctl --sync`)
	compare := func(flags []string, journalctl ...string) []map[string]any {
		t.Helper()
		got := f.documents(append([]string{"logs", "n1", "-t", "asked-test"}, flags...)...)
		want := strings.Split(f.exec(node, append([]string{"journalctl", "--no-pager", "--all", "-o", "cat", "-t", "asked-test"}, journalctl...)...), "\n")
		if !slices.Equal(field(got, "message"), want) {
			t.Errorf("logs %v: %q, and journalctl says %q", flags, field(got, "message"), want)
		}
		return got
	}
	all := compare(nil)
	if len(all) != 10 || all[0]["priority"] != 1.0 || all[0]["node"] != "n1" || all[0]["boot"] == "" {
		t.Errorf("%v", all)
	}
	compare([]string{"--priority", "err"}, "-p", "err")
	compare([]string{"--grep", "line [2-4]"}, "--grep", "line [2-4]")
	compare([]string{"--boot", "0", "--since", "1h"}, "--boot=0", "--since=-1h")
	since, err := time.Parse(time.RFC3339Nano, fmt.Sprint(all[4]["time"]))
	if err != nil {
		t.Fatal(err)
	}
	if got := field(f.documents("logs", "n1", "-t", "asked-test", "--since", since.Format(time.RFC3339Nano)), "message"); !slices.Equal(got, field(all[4:], "message")) {
		t.Errorf("since %v: %q", since, got)
	}
	if got := field(f.documents("logs", "n1", "-t", "asked-test", "--until", since.Format(time.RFC3339Nano)), "message"); !slices.Equal(got, field(all[:5], "message")) {
		t.Errorf("until %v: %q", since, got)
	}
	unit := field(f.documents("logs", "n1", "--unit", "hello"), "message")
	if want := strings.Split(f.exec(node, "journalctl", "--no-pager", "-o", "cat", "-u", "hello.service"), "\n"); !slices.Equal(unit, want) {
		t.Errorf("hello.service: %q, and journalctl says %q", unit, want)
	}
	// Pages, from the newest back: nothing twice, nothing left out.
	var paged []string
	before := []string{}
	for range 10 {
		page := f.documents(append([]string{"logs", "n1", "-t", "asked-test", "--lines", "3", "--since", "1h"}, before...)...)
		last := page[len(page)-1]
		if last["cut"] == true {
			page = page[:len(page)-1]
		}
		paged = append(field(page, "message"), paged...)
		if last["cut"] != true {
			break
		}
		before = []string{"--before", fmt.Sprint(last["next"])}
	}
	if !slices.Equal(paged, field(all, "message")) {
		t.Errorf("pages: %q", paged)
	}
	if r := f.must("logs", "n1", "-t", "asked-test"); strings.Contains(r.out, "\x1b") || !strings.Contains(r.out, "with colour") {
		t.Errorf("on a terminal: %q", r.out)
	}
	if r := f.cli("logs", "n1", "--boot", "-999"); r.code != 1 {
		t.Errorf("a boot that there is not: %v", r)
	}
	if r := f.must("logs", "n1", "--grep", "--output=/tmp/x"); r.out != "" {
		t.Errorf("a pattern that looks like an option: %v", r)
	}
}

func (f *fleet) queryStats(node *lab.Node) {
	t := f.t
	d := f.documents("stats", "n1", "--op", "all")[0]
	part := func(name string) map[string]any { m, _ := d[name].(map[string]any); return m }
	total := strings.Fields(f.exec(node, "grep", "MemTotal", "/proc/meminfo"))[1]
	if kib, _ := strconv.ParseFloat(total, 64); part("memory")["total"] != kib*1024 || part("health")["mem_total"] != kib*1024 {
		t.Errorf("memory %v, and /proc/meminfo says %s", part("memory"), total)
	}
	if got, want := fmt.Sprint(part("health")["cpus"]), f.exec(node, "sh", "-c", "grep -c '^cpu[0-9]' /proc/stat"); got != want {
		t.Errorf("%s processors of %s", got, want)
	}
	uptime, _ := strconv.ParseFloat(strings.Fields(f.exec(node, "cat", "/proc/uptime"))[0], 64)
	if got, _ := part("health")["uptime"].(float64); got > uptime || got < uptime-60 {
		t.Errorf("up for %v s, and /proc/uptime says %v", got, uptime)
	}
	// Interfaces, and who listens.
	var interfaces, want []string
	for _, i := range part("network")["interfaces"].([]any) {
		interfaces = append(interfaces, fmt.Sprint(i.(map[string]any)["name"]))
	}
	for line := range strings.Lines(f.exec(node, "sh", "-c", "tail -n +3 /proc/net/dev")) {
		if name, _, _ := strings.Cut(strings.TrimSpace(line), ":"); name != "lo" {
			want = append(want, name)
		}
	}
	if !slices.Equal(interfaces, want) {
		t.Errorf("interfaces %v, and /proc/net/dev says %v", interfaces, want)
	}
	ports := func(list []string) []string { slices.Sort(list); return slices.Compact(list) }
	var listen, ss []string
	sshd := false
	for _, s := range d["sockets"].([]any) {
		if m := s.(map[string]any); m["protocol"] == "tcp" {
			listen = append(listen, fmt.Sprint(m["port"]))
			sshd = sshd || m["port"] == 22.0 && m["process"] != nil
		}
	}
	for line := range strings.Lines(f.exec(node, "ss", "-ltnH")) {
		local := strings.Fields(line)[3]
		ss = append(ss, local[strings.LastIndexByte(local, ':')+1:])
	}
	if !slices.Equal(ports(listen), ports(ss)) || !sshd {
		t.Errorf("listening on %v (whose port 22 is, is known: %v), and ss says %v", listen, sshd, ss)
	}
	// Each file system as df has it; what is used changes meanwhile.
	all, _ := d["file_systems"].([]any)
	if len(all) == 0 {
		t.Errorf("no file systems: %v", d["notes"])
	}
	for _, one := range all {
		m := one.(map[string]any)
		df := strings.Fields(strings.Split(f.exec(node, "df", "-B1", "--output=size", fmt.Sprint(m["mount"])), "\n")[1])[0]
		if size, _ := strconv.ParseFloat(df, 64); m["total"] != size {
			t.Errorf("%v has %v bytes, and df says %s", m["mount"], m["total"], df)
		}
	}
	// A process that does nothing but count is the one with the most of the processor.
	f.exec(node, "systemd-run", "--unit=counts", "/bin/sh", "-c", "while :; do :; done")
	pid := f.property(node, "counts.service", "MainPID")
	f.eventually(soon, func() string {
		p := f.documents("stats", "n1", "--op", "processes")[0]["processes"].(map[string]any)
		top, _ := p["by_cpu"].([]any)
		for _, one := range top {
			if m := one.(map[string]any); fmt.Sprint(m["pid"]) == pid {
				return ""
			}
		}
		return fmt.Sprintf("process %s is not among %v", pid, top)
	})
	f.exec(node, "systemctl", "stop", "counts.service")
}

func (f *fleet) queryFiles(node *lab.Node) {
	t := f.t
	for _, dir := range []string{"/etc/nixos", "/var/log"} {
		if got, want := field(f.documents("files", dir, "n1"), "name"), strings.Fields(f.exec(node, "env", "LC_ALL=C", "ls", "-A", dir)); !slices.Equal(got, want) {
			t.Errorf("%s: %v, and ls says %v", dir, got, want)
		}
	}
	content := f.exec(node, "sh", "-c", "base64 -w0 /etc/nixos/flake.nix")
	if d := f.documents("files", "/etc/nixos/flake.nix", "n1")[0]; d["data"] != content {
		t.Errorf("flake.nix: %v", d)
	}
	if raw, _ := base64.StdEncoding.DecodeString(content); f.must("files", "/etc/nixos/flake.nix", "n1").out != string(raw) {
		t.Error("flake.nix is written as another one than it is")
	}
	// What the node's policy adds is read as root reads it.
	f.exec(node, "sh", "-c", "mkdir -p /srv/app && echo inside >/srv/app/own && chmod 600 /srv/app/own && ln -sf /etc/shadow /srv/app/out && echo x >/var/log/own && chmod 600 /var/log/own && ln -sf ../../etc/shadow /var/log/out && echo hidden >/etc/nixos/private && chmod 600 /etc/nixos/private")
	if r := f.must("files", "/srv/app/own", "n1"); r.out != "inside\n" {
		t.Errorf("%v", r)
	}
	for _, path := range []string{"/etc/shadow", "/srv/app/out", "/var/log/out", "/var/log/own", "/etc/nixos/private", "/var/log/journal", "/root", "/proc/1/environ", "/var/lib/nix-infra-agent"} {
		if r := f.cli("files", path, "n1"); r.code != 1 || r.out != "" {
			t.Errorf("%s: %v", path, r)
		}
	}
}

// TestFollowMerges: the journals of two nodes are followed in order of time, and the end of it is an end on the nodes.
func TestFollowMerges(t *testing.T) {
	f := shared(t)
	id := fmt.Sprintf("merged-%d", time.Now().UnixNano()) // the fleet's journals may have an earlier run's
	for _, n := range f.nodes {
		f.exec(n, "sh", "-c", "echo before | systemd-cat -t "+id+"; journalctl --sync")
	}
	cmd, out, errs := f.command("logs", "all", "--follow", "--identifier", id, "--json"), &output{}, &output{}
	cmd.Stdout, cmd.Stderr = out, errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.eventually(soon, func() string {
		if strings.Count(out.String(), "before") < 2 {
			return "what was there before is not shown: " + out.String() + errs.String()
		}
		return ""
	})
	// It waits half a second for entries of other nodes, and on a busy machine they may take longer. So it sees them all
	// at once, when the broker has had them all.
	const count = 12 // done long before the nodes take it that nobody listens any more
	tap := f.wiretap()
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for i := range count {
		f.exec(f.nodes[fmt.Sprintf("n%d", i%2+1)], "sh", "-c", fmt.Sprintf("echo number %d | systemd-cat -t %s", i, id))
	}
	f.eventually(soon, func() string {
		for i := range count {
			if tap.carrying(fmt.Sprintf(`"number %d"`, i)) == 0 {
				return fmt.Sprintf("entry %d is not on its way", i)
			}
		}
		return ""
	})
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	f.eventually(soon, func() string {
		if n := strings.Count(out.String(), "number"); n < count {
			return fmt.Sprintf("%d of %d entries: %s", n, count, out)
		}
		return ""
	})
	followers := func(n *lab.Node) string {
		found, _ := n.Exec(f.ctx, "pgrep", "-f", "journalctl.*--follow") // it fails where there is none
		return strings.TrimSpace(string(found))
	}
	for _, n := range f.nodes {
		if followers(n) == "" {
			t.Errorf("nobody follows on %s, so that this test would show nothing", n.Name)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // its status is looked at
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit %d: %s", code, errs)
	}
	docs := readDocuments(t, out.String())
	var numbers, nodes []string
	for _, d := range docs {
		if strings.HasPrefix(fmt.Sprint(d["message"]), "number ") {
			numbers = append(numbers, strings.TrimPrefix(fmt.Sprint(d["message"]), "number "))
			nodes = append(nodes, fmt.Sprint(d["node"]))
		}
	}
	for i := range count {
		if i >= len(numbers) || numbers[i] != strconv.Itoa(i) || nodes[i] != fmt.Sprintf("n%d", i%2+1) {
			t.Fatalf("entries %v of %v", numbers, nodes)
		}
	}
	for _, n := range f.nodes {
		f.eventually(atOnce, func() string {
			if pids := followers(n); pids != "" {
				return n.Name + " still follows: " + pids
			}
			return ""
		})
	}
}

// output can be read while a program writes to it.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}
