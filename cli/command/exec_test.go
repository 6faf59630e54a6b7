package command

import (
	"context"
	"encoding/base64"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
)

// runner is a node that runs commands as a test says, and remembers what it was asked to run.
type runner struct {
	node  *fleettest.Node
	mu    sync.Mutex
	asked []string
}

// does is what comes of a command: parts of output, and its end or a refusal.
type does func(argv []string, send func(protocol.Output), ended <-chan struct{}) (*protocol.Ending, error)

func newRunner(n *fleettest.Node, d does) *runner {
	r := &runner{node: n}
	run := func(o *protocol.Verified, send func(any), ended <-chan struct{}) error {
		r.mu.Lock()
		r.asked = append(r.asked, string(o.Action)+" "+string(o.Payload))
		r.mu.Unlock()
		var argv []string
		if order, err := protocol.Decode[protocol.CommandOrder](o.Payload); err == nil {
			argv = order.Argv
		}
		ending, err := d(argv, func(part protocol.Output) { send(part) }, ended)
		if ending != nil {
			send(protocol.Output{Ended: ending})
		}
		return err
	}
	n.Script(fleettest.Script{Streams: map[protocol.Action]fleettest.Streams{protocol.RunCommand: run, protocol.RunShell: run}})
	return r
}

// last is what was asked for last, and forgets all.
func (r *runner) last() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.asked) == 0 {
		return ""
	}
	last := r.asked[len(r.asked)-1]
	r.asked = nil
	return last
}

var success = &protocol.Ending{Result: "success", Rule: "uname", Millis: 7}

func exits(code int) *protocol.Ending {
	return &protocol.Ending{Exit: code, Result: "exit-code", Rule: "systemctl", Millis: 7}
}

// writes gives parts of stdout, then an end.
func writes(end *protocol.Ending, parts ...string) does {
	return func(_ []string, send func(protocol.Output), _ <-chan struct{}) (*protocol.Ending, error) {
		send(protocol.Output{})
		for _, p := range parts {
			send(protocol.Output{Stdout: []byte(p)})
		}
		return end, nil
	}
}

func refuses(code protocol.Code, reason string) does {
	return func([]string, func(protocol.Output), <-chan struct{}) (*protocol.Ending, error) {
		return nil, protocol.Refuse(code, "%s", reason)
	}
}

// What one node writes comes through byte by byte, and to the stream that it was written to.
func TestExecOneNode(t *testing.T) {
	s, f := newFleet(t)
	raw := "a\tb\x1b[31m\xff\r\nno end"
	web1 := newRunner(f.Add("web1"), func(_ []string, send func(protocol.Output), _ <-chan struct{}) (*protocol.Ending, error) {
		send(protocol.Output{})
		send(protocol.Output{Stdout: []byte(raw[:3]), Stderr: []byte("warn")})
		send(protocol.Output{Stdout: []byte(raw[3:]), Stderr: []byte("ing"), Dropped: 2048})
		return success, nil
	})
	r := s.run("exec", "web1", "--timeout", "90s", "--", "sh", "-c", "a  'b", "--json", "")
	if r.status != OK || r.out != raw || r.stderr != "warningweb1: 2.0 KiB of output were left out: there was more than the node lets through\n" {
		t.Errorf("%+v", r)
	}
	if got := web1.last(); got != `exec {"argv":["sh","-c","a  'b","--json",""],"timeout":90}` {
		t.Errorf("asked %s", got)
	}
	if r := s.run("exec", "web1", "--prefix", "always", "--", "x"); r.out != "web1: a\tb\ufffd\nweb1: no end\n" || !strings.HasPrefix(r.stderr, "web1: warning\n") {
		t.Errorf("%+v", r)
	}
	if r := s.run("exec", "web1", "--merge", "--", "x"); r.out != raw[:3]+"warn"+raw[3:]+"ing" {
		t.Errorf("%+v", r)
	}
	docs := documents(t, s.must("exec", "web1", "--json", "--", "x"))
	var stdout []byte
	for _, d := range docs[:len(docs)-1] {
		if d["stream"] == "stdout" {
			data, err := base64.StdEncoding.DecodeString(fmt.Sprint(d["data"]))
			if text, ok := d["text"].(string); ok {
				data, err = []byte(text), nil
			}
			if err != nil {
				t.Fatal(err)
			}
			stdout = append(stdout, data...)
		}
	}
	if last := docs[len(docs)-1]; string(stdout) != raw || fmt.Sprint(last) != "map[dropped:2048 exit:0 lost:0 ms:7 node:web1 piped:<nil> reason: result:success rule:uname]" {
		t.Errorf("%q, %v", stdout, last)
	}
}

// Of several nodes, lines never mix, whatever parts they come in.
func TestExecManyNodes(t *testing.T) {
	s, f := newFleet(t)
	long := strings.Repeat("x", 3*maxLine)
	turns := map[string]chan struct{}{"web1": make(chan struct{}, 1), "web2": make(chan struct{}, 1)}
	takeTurns := func(me, other string, parts ...string) does {
		return func(_ []string, send func(protocol.Output), _ <-chan struct{}) (*protocol.Ending, error) {
			for _, p := range parts {
				<-turns[me]
				send(protocol.Output{Stdout: []byte(p)})
				turns[other] <- struct{}{}
			}
			return success, nil
		}
	}
	web1, web2 := f.Add("web1"), f.Add("web2")
	newRunner(web1, takeTurns("web1", "web2", "on", "e\ntw", "o\n", "half"))
	newRunner(web2, takeTurns("web2", "web1", "1\n", "2", "\n3\n4\x1b[2J\n", ""))
	turns["web1"] <- struct{}{}
	r := s.run("exec", "web1", "web2", "--", "x")
	got := lines(r.out)
	slices.Sort(got)
	if want := []string{"web1: half", "web1: one", "web1: two", "web2: 1", "web2: 2", "web2: 3", "web2: 4"}; r.status != OK || !slices.Equal(got, want) || r.stderr != "" {
		t.Errorf("%+v", r)
	}
	newRunner(web1, writes(success, "a\x1b[1m\n", "no end"))
	newRunner(web2, writes(success, long[:maxLine], long[maxLine:], "\n"))
	r = s.run("exec", "web1", "web2", "--prefix", "never", "--", "x")
	if r.status != OK || !strings.Contains(r.out, "a\x1b[1m\n") || !strings.Contains(r.out, "no end\n") || strings.Count(r.out, "x") != len(long) {
		t.Errorf("%d bytes, status %d, %s", len(r.out), r.status, r.stderr)
	}
}

func TestExecOutcomes(t *testing.T) {
	s, f := newFleet(t)
	f.Register("away")
	newRunner(f.Add("good"), writes(success, "fine\n"))
	for i, d := range []does{writes(exits(3)), writes(exits(3)), writes(&protocol.Ending{Exit: -1, Result: "timeout", Reason: "it took longer than 60 s"}), writes(nil, "some"), refuses(protocol.Failed, "no bus")} {
		newRunner(f.Add(fmt.Sprintf("bad%d", i)), d)
	}
	newRunner(f.Add("no0"), refuses(protocol.Denied, "rule systemctl has no edit"))
	newRunner(f.Add("no1"), refuses(protocol.Denied, "rule systemctl has no edit"))
	newRunner(f.Add("no2"), refuses(protocol.OverRole, "this takes an operator"))
	lossy := f.Add("lossy")
	lossy.Script(fleettest.Script{Streams: map[protocol.Action]fleettest.Streams{protocol.RunCommand: func(o *protocol.Verified, send func(any), _ <-chan struct{}) error {
		send(protocol.Output{})
		reply := protocol.Answer("lossy", protocol.Output{Ended: success}, nil)
		reply.Part, reply.More = 4, false
		lossy.Say(protocol.ReplySubject(o.Sender.Name, o.ID, "lossy"), protocol.Encode(reply))
		return nil
	}}})
	for _, c := range []struct {
		nodes  string
		status int
		says   []string
	}{
		{"good", OK, nil},
		{"bad0", SomeFailed, []string{"nix-infra: bad0: exited with 3\n"}},
		{"good bad0 bad1", SomeFailed, []string{"nix-infra: bad0 bad1: exited with 3\n"}},
		{"bad2", SomeFailed, []string{"bad2: it took longer than 60 s\n"}},
		{"bad3", SomeFailed, []string{"bad3: it did not say how it ended\n"}},
		{"bad4", SomeFailed, []string{"refused: bad4: no bus (failed)\n"}},
		{"lossy", SomeFailed, []string{"lossy: 2 parts of its output did not arrive\n"}},
		{"no0 no1", Refused, []string{"refused: no0 no1: rule systemctl has no edit; its configuration can allow it (docs/policy.md), and --via=ssh needs no such leave (denied)\n"}},
		{"no0 no2", Refused, []string{"no0: rule", "no2: this takes an operator (over-role)\n"}},
		{"good no0", SomeFailed, []string{"no0: rule"}},
		{"away", Unanswered, []string{"no answer from away\n"}},
		{"good away", Unanswered, []string{"no answer from away\n"}},
		{"no0 away", Refused, []string{"no0: rule", "no answer from away\n"}},
		{"bad0 no0 away", SomeFailed, []string{"bad0: exited with 3\n", "no0: rule", "no answer from away\n"}},
	} {
		r := s.run("exec", c.nodes, "--", "x")
		if r.status != c.status || strings.Contains(c.nodes, "good") && !strings.Contains(r.out, "fine\n") || (c.says == nil) != (r.stderr == "") {
			t.Errorf("%s: %+v", c.nodes, r)
		}
		for _, says := range c.says {
			if !strings.Contains(r.stderr, says) {
				t.Errorf("%s: no %q in %s", c.nodes, says, r.stderr)
			}
		}
	}
	results := map[string]string{}
	for _, d := range documents(t, s.run("exec", "--json", "all", "--", "x").out) {
		if result, ok := d["result"]; ok {
			results[fmt.Sprint(d["node"])] += fmt.Sprint(result, " ", d["exit"], " ", d["reason"])
		}
	}
	for node, want := range map[string]string{"good": "success 0 ", "bad0": "exit-code 3 ", "bad2": "timeout -1 it took longer than 60 s", "bad3": "failed <nil> it did not say how it ended",
		"bad4": "failed <nil> no bus", "no1": "refused <nil> rule systemctl has no edit", "away": "no-answer <nil> ", "lossy": "success 0 "} {
		if results[node] != want {
			t.Errorf("%s: %q, want %q", node, results[node], want)
		}
	}
}

// What stands behind a | runs here, over the output of each node, and its exit status counts.
func TestExecPipes(t *testing.T) {
	s, f := newFleet(t)
	endless := func(_ []string, send func(protocol.Output), ended <-chan struct{}) (*protocol.Ending, error) {
		send(protocol.Output{})
		for i := 0; ; i++ {
			select {
			case <-ended:
				return &protocol.Ending{Exit: -1, Result: "signal", Reason: "it was ended"}, nil
			default:
				send(protocol.Output{Stdout: []byte(fmt.Sprintf("line %d\n", i))})
				time.Sleep(time.Millisecond) // as something that watches
			}
		}
	}
	web1 := newRunner(f.Add("web1"), writes(exits(3), "one\ntw", "o\nthree\n"))
	newRunner(f.Add("web2"), writes(success))
	newRunner(f.Add("no"), refuses(protocol.Denied, "no rule for it"))
	newRunner(f.Add("endless"), endless)
	pipe := func(nodes, text string, more ...string) run {
		return s.run(append([]string{"cmd", "--target=" + nodes, text}, more...)...)
	}
	if r := pipe("web1", "systemctl status 'a b' | grep t | sed 's/t/<&>/'"); r.status != OK || r.out != "<t>wo\n<t>hree\n" || web1.last() != `exec {"argv":["systemctl","status","a b"]}` {
		t.Errorf("%+v", r)
	}
	if r := pipe("web1 web2", "x | wc -l"); r.status != OK || !strings.Contains(r.out, "web1: 3\n") || !strings.Contains(r.out, "web2: 0\n") {
		t.Errorf("%+v", r)
	}
	if r := pipe("web1 web2", "x | grep one"); r.status != SomeFailed || r.out != "web1: one\n" || r.stderr != "nix-infra: web2: grep exited with 1\n" {
		t.Errorf("%+v", r)
	}
	if r := pipe("endless", "x | head -n 2"); r.status != OK || r.out != "line 0\nline 1\n" || r.stderr != "" {
		t.Errorf("%+v", r)
	}
	if r := pipe("no", "x | wc -l"); r.status != Refused || r.out != "" {
		t.Errorf("%+v", r)
	}
	if r := pipe("web1", "x | sh -c 'cat >&2; kill -9 $$'"); r.status != SomeFailed || r.out != "" || r.stderr != "one\ntwo\nthree\nnix-infra: web1: sh exited with 137\n" {
		t.Errorf("%+v", r)
	}
	docs := documents(t, pipe("web1", "x | grep -c o", "--json").out)
	if len(docs) != 2 || docs[0]["text"] != "2\n" || docs[1]["exit"] != 3.0 || docs[1]["piped"] != 0.0 {
		t.Errorf("%v", docs)
	}
	web1.last()
	s.expect(Refused, `"no-such-program": what stands behind a | runs on this machine`, "cmd", "--target=web1", "x | no-such-program")
	if got := web1.last(); got != "" {
		t.Errorf("it was run all the same: %s", got)
	}
}

func TestExecShell(t *testing.T) {
	s, f := newFleet(t)
	web1 := newRunner(f.Add("web1"), writes(success, "fine\n"))
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--target=web1", "cd /; ls | wc -l"}, `shell {"text":"cd /; ls | wc -l"}`},
		{[]string{"--target=web1", "a\nb\n"}, `shell {"text":"a\nb"}`},
		{[]string{"--target=web1", "--shell", "uname"}, `shell {"text":"uname"}`},
		{[]string{"web1", "--shell", "--", "for i in 1 2; do echo; done"}, `shell {"text":"for i in 1 2; do echo; done"}`},
		{[]string{"web1", "--shell", "--", "echo", "it's"}, `shell {"text":"'echo' 'it'\\''s'"}`},
		{[]string{"--target", "web1", "systemctl", "status", "a"}, `exec {"argv":["systemctl","status","a"]}`},
		{[]string{"systemctl status a\n", "--target", "web1"}, `exec {"argv":["systemctl","status","a"]}`},
		{[]string{"--target=web1", "--", "systemctl status a"}, `exec {"argv":["systemctl","status","a"]}`},
		{[]string{"--target=web1", "--", "ls", "-l", "a b"}, `exec {"argv":["ls","-l","a b"]}`},
		{[]string{"web1", "--", "echo", "a; b"}, `exec {"argv":["echo","a; b"]}`},
	} {
		s.must(append([]string{"cmd"}, c.args...)...)
		if got := web1.last(); got != c.want {
			t.Errorf("%q: asked %s, want %s", c.args, got, c.want)
		}
	}
	newRunner(web1.node, refuses(protocol.Denied, "no shell is allowed here"))
	r := s.run("cmd", "--target=web1", "a > b")
	if r.status != Refused || !strings.Contains(r.stderr, "no shell is allowed here; to do without a shell: quote it") || !strings.Contains(r.stderr, "(character 3, '>')") || !strings.Contains(r.stderr, "--via=ssh") {
		t.Errorf("%+v", r)
	}
	creds := s.path("ops.creds")
	if err := os.WriteFile(creds, f.Credentials("ops", protocol.Operator, time.Time{}), 0o600); err != nil {
		t.Fatal(err)
	}
	s.expect(Refused, "only an admin may have run, and ops is operator; to do without", "--creds", creds, "cmd", "--target=web1", "a && b")
	for says, args := range map[string][]string{
		"stands behind --":      {"exec", "web1"},
		"Nothing stands behind": {"exec", "web1", "--"},
		"which nodes":           {"exec", "--", "uname"},
		"beside --target":       {"cmd", "--target=web1", " "},
		"never closed":          {"cmd", "--target=web1", "echo 'a"},
		"\"telnet\": use agent": {"exec", "web1", "--via=telnet", "--", "x"},
		"--timeout 1.5s":        {"exec", "web1", "--timeout=1.5s", "--", "x"},
		"--wait 0s":             {"exec", "web1", "--wait=0s", "--", "x"},
		"nothing ends it but":   {"exec", "web1", "--via=ssh", "--timeout=1s", "--", "x"},
		"in quotes":             {"cmd", "--target=web1", "ls", "--all"},
		"no node":               {"exec", "web9", "--", "x"},
	} {
		s.expect(Refused, says, args...)
	}
}

// Ctrl-C ends what runs, there and here, and what is said of the end is heard.
func TestExecInterrupted(t *testing.T) {
	s, f := newFleet(t)
	ending := func(_ []string, send func(protocol.Output), ended <-chan struct{}) (*protocol.Ending, error) {
		send(protocol.Output{Stdout: []byte("begun\n")})
		<-ended
		send(protocol.Output{Stdout: []byte("bye\n")})
		return &protocol.Ending{Exit: -1, Result: "signal", Reason: "it was ended"}, nil
	}
	nodes := []*fleettest.Node{f.Add("web1"), f.Add("web2")}
	for _, n := range nodes {
		newRunner(n, ending)
	}
	ctx, interrupt := context.WithCancel(t.Context())
	out := &watched{}
	ended := make(chan run, 1)
	go func() { ended <- s.runContext(ctx, out, "exec", "web1", "web2", "--", "sleep", "1000") }()
	out.await("web1: begun")
	out.await("web2: begun")
	interrupt()
	r := <-ended
	if r.status != Interrupted || !strings.Contains(r.out, "web1: bye\n") || !strings.Contains(r.out, "web2: bye\n") || r.stderr != "nix-infra: interrupted; nothing of it runs any more\n" {
		t.Errorf("%+v", r)
	}
	for _, n := range nodes {
		if o := n.Orders(); len(o) != 1 || !o[0].End {
			t.Errorf("%s got %+v", n.Name, o)
		}
	}

	ctx, interrupt = context.WithCancel(t.Context())
	defer interrupt()
	out = &watched{}
	go func() {
		ended <- s.runContext(ctx, out, "cmd", "--target=web1", "sleep 1000 | sh -c 'echo $$; sleep 1000; echo never'")
	}()
	out.await("\n")
	interrupt()
	r = <-ended
	pid, err := strconv.Atoi(strings.TrimSpace(r.out))
	if r.status != Interrupted || err != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	for deadline := time.Now().Add(time.Minute); syscall.Kill(-pid, 0) != syscall.ESRCH; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("what ran here runs on")
		}
	}
}
