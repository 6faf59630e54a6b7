package command

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// replies makes a node answer an action, and remember what it was asked.
func replies(n *fleettest.Node, action protocol.Action, body any, refused error) (asked func() string) {
	var mu sync.Mutex
	var payload string
	n.Script(fleettest.Script{Answers: func(o *protocol.Verified) (any, error) {
		if o.Action != action {
			return nil, protocol.Refuse(protocol.Unknown, "not %s", o.Action)
		}
		mu.Lock()
		defer mu.Unlock()
		payload = string(o.Payload)
		return body, refused
	}})
	return func() string { mu.Lock(); defer mu.Unlock(); return payload }
}

func TestUnits(t *testing.T) {
	s, f := newFleet(t)
	list := protocol.UnitList{Units: []protocol.Unit{{Name: "nginx.service", Description: "web \x1b[31mserver", Load: "loaded", Active: "failed", Sub: "failed"}}, Total: 3, Next: "nginx.service"}
	asked := replies(f.Add("web1", "web"), protocol.ListUnits, list, nil)
	r := s.run("units", "web1", "--failed", "--pattern", "ng*", "--after", "a.service")
	if r.status != OK || r.out != "nginx.service  loaded  failed  failed  web server\n" || r.stderr != "web1: 2 more units not shown; see them with --after nginx.service\n" {
		t.Errorf("%+v", r)
	}
	if got := asked(); got != `{"states":["failed"],"patterns":["ng*"],"after":"a.service"}` {
		t.Errorf("asked %s", got)
	}
	if r := s.run("units", "web1", "--prefix", "always"); !strings.HasPrefix(r.out, "web1: nginx.service") {
		t.Errorf("%+v", r)
	}
	docs := documents(t, s.must("units", "web1", "--json"))
	if len(docs) != 2 || docs[0]["node"] != "web1" || docs[0]["active"] != "failed" || docs[1]["cut"] != true || docs[1]["next"] != "nginx.service" {
		t.Errorf("%v", docs)
	}

	// Several: named in front, refusals and missing answers named, by status 1 and 3.
	replies(f.Add("web2", "web"), protocol.ListUnits, protocol.UnitList{}, nil)
	f.Register("web3", "web")
	r = s.run("units", "@web")
	if r.status != Unanswered || !strings.Contains(r.out, "web1: nginx.service") || !strings.Contains(r.stderr, "no answer from web3") {
		t.Errorf("%+v", r)
	}
	replies(f.Add("web4", "web"), protocol.ListUnits, nil, protocol.Refuse(protocol.Failed, "no bus"))
	r = s.run("units", "@web", "--prefix", "never")
	if r.status != SomeFailed || !strings.HasPrefix(r.out, "nginx") || !strings.Contains(r.stderr, "web4: no bus") || !strings.Contains(r.stderr, "no answer from web3") {
		t.Errorf("%+v", r)
	}
	s.expect(Refused, `state "--all" is not valid`, "units", "web1", "--state=--all")
	s.expect(Refused, `--prefix "x"`, "units", "web1", "--prefix", "x")
	s.expect(Refused, `--concurrency 0`, "units", "web1", "--concurrency", "0")
	s.expect(Refused, `--timeout 0s`, "units", "web1", "--timeout", "0s")
}

func TestUnit(t *testing.T) {
	s, f := newFleet(t)
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	status := protocol.UnitStatus{Unit: protocol.Unit{Name: "backup.service", Description: "Backup", Load: "loaded", Active: "active", Sub: "running"}, State: "linked", File: "/etc/b", PID: 7, Memory: 2048, Tasks: 1, CPU: 5e9,
		Dependencies: map[string][]string{"Requires": {"a.target", "b.mount"}}, Timers: []protocol.Timer{{Name: "backup.timer", Triggers: "backup.service", Next: &at}},
		Sockets: []protocol.Socket{{Name: "backup.socket", Listen: []string{"Stream 0.0.0.0:9"}, Accepted: 4}}, Log: []protocol.JournalEntry{{Time: at, Identifier: "b", PID: 7, Message: "\x1b]0;title\adone"}}}
	asked := replies(f.Add("web1"), protocol.ShowUnit, status, nil)
	out := s.must("unit", "backup", "web1", "--lines", "3")
	for _, want := range []string{"active (running)", "Requires", "a.target b.mount", "backup.timer starts backup.service", "Stream 0.0.0.0:9", "2.0 KiB, 5s of CPU time, 1 task", "b[7]: done"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.ContainsAny(out, "\x1b\a") || asked() != `{"name":"backup.service","lines":3}` {
		t.Errorf("%q, asked %s", out, asked())
	}
	if d := documents(t, s.must("unit", "backup.service", "web1", "--json")); len(d) != 1 || d[0]["node"] != "web1" || d[0]["pid"] != 7.0 {
		t.Errorf("%v", d)
	}
	s.expect(Refused, "which unit", "unit")
	s.expect(Refused, `"a b.service" is no unit's name`, "unit", "a b")
}

func entry(n int, message string) protocol.JournalEntry {
	return protocol.JournalEntry{Time: time.UnixMilli(1_700_000_000_000 + int64(n)).UTC(), Identifier: "app", PID: 1, Priority: 6, Message: message, Cursor: fmt.Sprintf("s=1;i=%x", n)}
}

func TestLogs(t *testing.T) {
	s, f := newFleet(t)
	part := protocol.JournalPart{Entries: []protocol.JournalEntry{entry(1, "first"), entry(2, "two\nlines\x1b[2J"), {Message: "cut", Cut: 5}}, Next: "s=1;i=1"}
	asked := replies(f.Add("web1"), protocol.ReadJournal, part, nil)
	r := s.run("logs", "web1", "--unit", "nginx,a*", "-t", "x", "--priority", "err", "--grep", "--help", "--boot", "-1", "--lines", "5", "--since", "1970-01-01T00:00:01Z", "--until", "1970-01-02T00:00:00Z")
	if r.status != OK || !strings.Contains(r.out, "app[1]: first\n") || !strings.Contains(r.out, "app[1]: two\n    lines\n") || !strings.Contains(r.out, "cut … (5 bytes more)") || strings.Contains(r.out, "\x1b") ||
		!strings.Contains(r.stderr, "web1: only 3 entries fit into an answer; see the older ones with --before 's=1;i=1'") {
		t.Errorf("%+v", r)
	}
	if got := asked(); got != `{"units":["nginx.service","a*"],"identifiers":["x"],"since":1000000,"until":86400000000,"priority":3,"grep":"--help","boot":"-1","lines":5}` {
		t.Errorf("asked %s", got)
	}
	docs := documents(t, s.must("logs", "web1", "--json"))
	if len(docs) != 4 || docs[1]["message"] != "two\nlines\x1b[2J" || docs[0]["node"] != "web1" || docs[3]["next"] != "s=1;i=1" {
		t.Errorf("%v", docs)
	}
	before := time.Now().Add(-time.Hour).UnixMicro()
	s.must("logs", "web1", "--since", "1h")
	var q protocol.JournalQuery
	if err := json.Unmarshal([]byte(asked()), &q); err != nil || q.Since < before || q.Since > time.Now().Add(-time.Hour).UnixMicro() || q.Lines != 100 {
		t.Errorf("%+v, %v", q, err)
	}
	f.Add("web2")
	for _, c := range [][]string{
		{"--since: \"soon\" is no time", "--since", "soon"}, {"--priority \"loud\"", "--priority", "loud"}, {"priority 9", "--priority", "9"}, {"--follow goes on", "--follow", "--until", "1h"},
		{"no cursor", "--before", "x"}, {"5001 lines", "--lines", "5001"}, {"boot", "--boot", "--x"}, {"one node", "--before", "s=1;i=1", "web2"},
	} {
		s.expect(Refused, c[0], append([]string{"logs", "web1"}, c[1:]...)...)
	}
}

func TestMerger(t *testing.T) {
	now := time.Now()
	m := &merger{hold: time.Second}
	shown := func(after time.Duration) string {
		var all []string
		for _, a := range m.due(now.Add(after)) {
			all = append(all, a.node+":"+a.entry.Message)
		}
		return strings.Join(all, " ")
	}
	m.add("a", []protocol.JournalEntry{entry(1, "1"), entry(4, "4")}, now)
	m.add("b", []protocol.JournalEntry{entry(2, "2"), entry(9, "9")}, now.Add(500*time.Millisecond))
	if got := shown(999 * time.Millisecond); got != "" {
		t.Errorf("too early: %s", got)
	}
	if got := shown(time.Second); got != "a:1 b:2 a:4" {
		t.Errorf("merged: %s", got)
	}
	m.add("a", []protocol.JournalEntry{entry(9, "same"), entry(3, "late")}, now.Add(time.Second))
	if got := shown(1500 * time.Millisecond); got != "a:late b:9 a:same" {
		t.Errorf("merged: %s", got)
	}
	if got := shown(time.Hour); got != "" {
		t.Errorf("twice: %s", got)
	}
}

// syncBuffer can be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}
func (b *syncBuffer) String() string { b.mu.Lock(); defer b.mu.Unlock(); return b.b.String() }

func TestFollow(t *testing.T) {
	s, f := newFleet(t)
	feeds := map[string]chan protocol.JournalPart{}
	nodes := map[string]*fleettest.Node{}
	for _, name := range []string{"web1", "web2"} {
		feed := make(chan protocol.JournalPart, 10)
		feeds[name] = feed
		nodes[name] = f.Add(name)
		nodes[name].Script(fleettest.Script{Streams: map[protocol.Action]fleettest.Streams{protocol.FollowJournal: func(_ *protocol.Verified, send func(any), ended <-chan struct{}) error {
			for {
				select {
				case part := <-feed:
					send(part)
				case <-ended:
					return nil
				}
			}
		}}})
	}
	f.Register("web3")
	feeds["web1"] <- protocol.JournalPart{Entries: []protocol.JournalEntry{entry(10, "ten"), entry(30, "thirty")}}
	feeds["web2"] <- protocol.JournalPart{Entries: []protocol.JournalEntry{entry(20, "twenty"), entry(40, "forty")}, Dropped: 7}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &syncBuffer{}
	ended := make(chan run, 1)
	go func() { ended <- s.runContext(ctx, out, "logs", "all", "--follow", "--json") }()
	for deadline := time.Now().Add(time.Minute); strings.Count(out.String(), "\n") < 4; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not all came: %s", out)
		}
	}
	cancel()
	r := <-ended
	messages := map[any]string{}
	for _, d := range documents(t, r.out) {
		messages[d["node"]] += fmt.Sprint(d["message"], " ")
	}
	if r.status != Interrupted || messages["web1"] != "ten thirty " || messages["web2"] != "twenty forty " {
		t.Errorf("status %d: %v", r.status, messages)
	}
	for _, want := range []string{"web2: 7 entries are missing here", "web3: no answer", "interrupted"} {
		if !strings.Contains(r.stderr, want) {
			t.Errorf("no %q in %s", want, r.stderr)
		}
	}
	for name, n := range nodes {
		for deadline := time.Now().Add(time.Minute); len(n.Orders()) == 0; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s was not told to end", name)
			}
		}
		if o := n.Orders(); !o[len(o)-1].End {
			t.Errorf("%s: %+v", name, o)
		}
	}
}

// What one node says later comes first where it is earlier, and what waited is shown at the end.
func TestFollowMerges(t *testing.T) {
	var out bytes.Buffer
	terminal, err := ui.New(&out, "never", os.Getenv)
	if err != nil {
		t.Fatal(err)
	}
	q := &question{app: &app{Environment: Environment{Stdout: &out, Stderr: &out}, out: terminal, json: true}}
	heard := make(chan news)
	go func() {
		heard <- news{node: "web1", part: protocol.JournalPart{Entries: []protocol.JournalEntry{entry(10, "ten"), entry(30, "thirty")}}}
		heard <- news{node: "web2", part: protocol.JournalPart{Entries: []protocol.JournalEntry{entry(20, "twenty"), entry(40, "forty")}}}
		close(heard)
	}()
	q.showMerged(&merger{hold: time.Hour}, heard)
	var messages []string
	for _, d := range documents(t, out.String()) {
		messages = append(messages, fmt.Sprint(d["message"]))
	}
	if !slices.Equal(messages, []string{"ten", "twenty", "thirty", "forty"}) {
		t.Errorf("shown are %q", messages)
	}
}

func TestStats(t *testing.T) {
	s, f := newFleet(t)
	all := protocol.Stats{Interval: 1, Health: &protocol.HealthStats{Uptime: 90, CPUs: 2, MemTotal: 1 << 30, Pressure: map[string]protocol.Pressure{"cpu": {Some: &protocol.Stall{Avg10: 1.5}}}},
		Memory: &protocol.MemoryStats{Dirty: 4096}, Disks: []protocol.DiskStats{{Name: "sda", ReadRate: 2048}}, FileSys: []protocol.FileSystem{{Mount: "/data", Used: 95, Mark: "critical"}},
		Network:   &protocol.NetworkStats{Interfaces: []protocol.Interface{{Name: "eth0"}}, Connections: map[string]int{"established": 3}, UDP: 2},
		Processes: &protocol.ProcessStats{Total: 80, ByCPU: []protocol.Process{{PID: 42, Name: "evil\x1b[1m", CPU: 99.5}}}, Sockets: []protocol.Listener{{Protocol: "tcp", Address: "::", Port: 22, Process: "sshd"}}, Notes: []string{"/mnt is not asked"}}
	asked := replies(f.Add("web1"), protocol.ReadStats, all, nil)
	out := s.must("stats", "web1", "--op", "all")
	for _, want := range []string{"HEALTH", "1m30s", "none", "cpu some 1.50/0.00/0.00 %", "MEMORY", "4.0 KiB", "DISK-IO", "2.0 KiB", "DISK-USAGE", "critical", "NETWORK", "tcp: 3 established; udp: 2", "PROCESSES", "80, 0 running", "99.5 %", "SOCKETS", "sshd", "note: /mnt is not asked"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "\x1b") || asked() != `{"top":5}` {
		t.Errorf("%q, asked %s", out, asked())
	}
	if d := documents(t, s.must("stats", "web1", "--json")); len(d) != 1 || d[0]["node"] != "web1" || d[0]["health"].(map[string]any)["uptime"] != 90.0 || asked() != `{"operations":["health"],"top":5}` {
		t.Errorf("%v, asked %s", d, asked())
	}
	s.expect(Refused, `no operation "disks"`, "stats", "web1", "--op", "disks")
}

func TestFiles(t *testing.T) {
	s, f := newFleet(t)
	content := "plain\ttext\n\x1b[31mred\n"
	web1 := f.Add("web1")
	asked := replies(web1, protocol.ReadFiles, protocol.FileAnswer{FileInfo: protocol.FileInfo{Name: "/etc/nixos/a", Kind: "file", Size: 100}, Offset: 10, Data: []byte(content)}, nil)
	r := s.run("files", "/etc/nixos/a", "web1", "--offset", "10")
	if r.out != content || r.stderr != fmt.Sprintf("web1: %d B of 100 B follow; see them with --offset %d\n", 90-len(content), 10+len(content)) || asked() != `{"path":"/etc/nixos/a","offset":10}` {
		t.Errorf("%+v, asked %s", r, asked())
	}
	if r := s.run("files", "/etc/nixos/a", "web1", "--prefix", "always"); r.out != "web1: plain        text\nweb1: red\n" {
		t.Errorf("%q", r.out)
	}
	if r := s.run("files", "/etc/nixos/a", "web1", "--limit", fmt.Sprint(len(content))); r.stderr != "" {
		t.Errorf("as much as was wanted is said to be cut: %+v", r)
	}
	if d := documents(t, s.must("files", "/etc/nixos/a", "web1", "--json")); len(d) != 2 || d[0]["data"] != base64.StdEncoding.EncodeToString([]byte(content)) || d[0]["offset"] != 10.0 || d[1]["cut"] != true {
		t.Errorf("%v", d)
	}
	asked = replies(web1, protocol.ReadFiles, protocol.FileAnswer{FileInfo: protocol.FileInfo{Name: "/etc/nixos", Kind: "folder"}, Entries: []protocol.FileInfo{
		{Name: "a", Kind: "file", Size: 3, Mode: 0o644}, {Name: "b", Kind: "folder", Mode: 0o755}, {Name: "c", Kind: "link", Target: "a\x1b[1m"}}, Next: "c"}, nil)
	r = s.run("files", "/etc/nixos/", "web1", "--after", "0")
	if !strings.Contains(r.out, "file    rw-r--r--  3") || !strings.Contains(r.out, "  b/\n") || !strings.Contains(r.out, "  c -> a\n") || !strings.Contains(r.stderr, "--after c") || asked() != `{"path":"/etc/nixos","after":"0"}` {
		t.Errorf("%+v, asked %s", r, asked())
	}
	replies(web1, protocol.ReadFiles, nil, protocol.Refuse(protocol.Invalid, "it is not among the files"))
	if r := s.run("files", "/etc/shadow", "web1"); r.status != SomeFailed || !strings.Contains(r.stderr, "not among the files") {
		t.Errorf("%+v", r)
	}
	s.expect(Refused, "which file", "files")
	s.expect(Refused, "absolute path", "files", "etc", "web1")
	s.expect(Refused, "absolute path", "files", "/etc/../root", "web1")
}

func TestFacts(t *testing.T) {
	s, f := newFleet(t)
	replies(f.Add("web1", "web"), protocol.Facts, protocol.Beat{Kernel: "6.12.1", NixOS: "25.11", RebootNeeded: true}, nil)
	if out := s.must("facts", "web1"); !strings.Contains(out, "6.12.1") || !strings.Contains(out, "reboot") {
		t.Errorf("%s", out)
	}
	if d := documents(t, s.must("facts", "web1", "--json")); len(d) != 1 || d[0]["node"] != "web1" || d[0]["kernel"] != "6.12.1" || d[0]["reboot_needed"] != true || d[0]["online"] != true || fmt.Sprint(d[0]["tags"]) != "[web]" {
		t.Errorf("%v", d)
	}
}
