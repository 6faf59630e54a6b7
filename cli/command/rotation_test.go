package command

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
)

// holders are nodes that hold a secret as agents do: each order is opened with the node's key, and some say no to a value.
type holders struct {
	t     *testing.T
	fleet *fleettest.Fleet
	nodes map[string]*fleettest.Node

	mu     sync.Mutex
	values map[string]string              // what each holds now
	orders []string                       // "node value", in the order in which they came
	says   func(node, value string) error // what a node answers; nil: yes
}

func newHolders(t *testing.T, f *fleettest.Fleet, tags map[string]string, names ...string) *holders {
	h := &holders{t: t, fleet: f, nodes: map[string]*fleettest.Node{}, values: map[string]string{}}
	for _, name := range names {
		n := f.Add(name, strings.Fields(tags[name])...)
		h.nodes[name] = n
		h.values[name] = "old"
		n.Script(fleettest.Script{Answers: func(o *protocol.Verified) (any, error) { return h.answer(name, o) }})
	}
	return h
}

func (h *holders) answer(node string, o *protocol.Verified) (any, error) {
	if o.Action != protocol.RotateSecret {
		return nil, nil
	}
	order, err := protocol.Decode[protocol.RotateOrder](o.Payload)
	if err == nil {
		err = order.Validate()
	}
	if err != nil {
		return nil, err
	}
	value, err := protocol.Unseal(order.Secret.Sealed, h.fleet.XKey(node))
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.orders = append(h.orders, node+" "+string(value))
	if h.says != nil {
		if err := h.says(node, string(value)); err != nil {
			return nil, err
		}
	}
	same := h.values[node] == string(value)
	h.values[node] = string(value)
	return protocol.Rotated{Same: same, Units: []string{order.Secret.Name + ".service"}}, nil
}

// hold checks what the nodes have.
func (h *holders) hold(want map[string]string) {
	h.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if fmt.Sprint(h.values) != fmt.Sprint(want) {
		h.t.Errorf("the nodes hold %v, want %v", h.values, want)
	}
}

func (h *holders) say(f func(node, value string) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.says, h.orders = f, nil
}

func (h *holders) ordered() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.orders)
}

// newRotated is a fleet of web1, web2 and db1 whose files name the secret s, of value old.
func newRotated(t *testing.T) (*shell, *holders) {
	s, f := newFleet(t)
	h := newHolders(t, f, map[string]string{"web1": "web", "web2": "web", "db1": "db"}, "web1", "web2", "db1")
	for _, n := range []string{"web1", "web2", "db1"} {
		s.write("nodes/"+n+".nix", "[%%secrets/s%%]")
	}
	f.Add("other")
	s.pipe("old", "secrets", "store", "s")
	return s, h
}

func TestRotate(t *testing.T) {
	s, h := newRotated(t)
	s.write("secrets/.changed.json", `{"s": "2024-01-02T03:04:05Z"}`)
	out := s.pipe("new\n", "secrets", "rotate", "s")
	h.hold(map[string]string{"web1": "new", "web2": "new", "db1": "new"})
	if !strings.Contains(out, "web1: rotated: s.service") || !strings.Contains(out, "secret s has its new value, on 3 nodes") || strings.Contains(out, "other") {
		t.Errorf("it says\n%s", out)
	}
	if s.value("s") != "new" || strings.Contains(s.read("secrets/.changed.json"), "2024") {
		t.Error("the project has the old value, or its age")
	}
	if out := s.pipe("new", "secrets", "rotate", "s"); !strings.Contains(out, "web1: same") {
		t.Errorf("it says\n%s", out)
	}
	s.expect(Refused, "there is no secret none", "secrets", "rotate", "none", "--generate", "32")
	s.expect(Refused, "no rotation of s was interrupted", "secrets", "rotate", "s", "--resume")
	s.expect(Refused, "rotate which secret", "secrets", "rotate")
	s.expect(Refused, "use one of them", "secrets", "rotate", "s", "--resume", "--undo")
	s.expect(Refused, "leave out the name", "secrets", "rotate", "s", "--due")
	s.expect(Refused, "--timeout", "secrets", "rotate", "s", "--generate", "32", "--timeout", "1s", "--settle", "2s")
	s.expect(Refused, "--max-failures", "secrets", "rotate", "s", "--generate", "32", "--max-failures", "x")
	// One that no node uses needs nobody.
	s.pipe("x", "secrets", "store", "unused")
	if out := s.pipe("y", "secrets", "rotate", "unused"); !strings.Contains(out, "no node's file names it") || s.value("unused") != "y" {
		t.Error(out)
	}
	// And a viewer may not.
	s.write("v.creds", string(h.fleet.Credentials("eve", protocol.Viewer, time.Time{})))
	s.stdin = "evil"
	if r := s.run("--creds", s.path("v.creds"), "secrets", "rotate", "s"); r.status == OK || s.value("s") != "new" {
		t.Errorf("a viewer rotated: %+v", r)
	}
	h.hold(map[string]string{"web1": "new", "web2": "new", "db1": "new"})
}

// TestRotateInWaves: one node first, then by the order of tags and batch, each wave after the one before.
func TestRotateInWaves(t *testing.T) {
	s, h := newRotated(t)
	s.pipe("new", "secrets", "rotate", "s", "--order", "@db,@web", "--batch", "1", "--settle", "0s")
	if got := h.ordered(); !slices.Equal(got, []string{"db1 new", "web1 new", "web2 new"}) {
		t.Errorf("ordered %q", got)
	}
	h.say(nil)
	s.pipe("newer", "secrets", "rotate", "s")
	if got := h.ordered(); got[0] != "db1 newer" || len(got) != 3 {
		t.Errorf("ordered %q", got)
	}
}

func TestWavesOf(t *testing.T) {
	var nodes []*rotating
	for i, tags := range []string{"web", "db", "web", "", "db", "web"} {
		n := &rotating{}
		n.Name, n.Tags = fmt.Sprintf("n%d", i), strings.Fields(tags)
		nodes = append(nodes, n)
	}
	for _, c := range []struct {
		s    protocol.Strategy
		want string
	}{
		{protocol.Strategy{}, "[[n0 n1 n2 n3 n4 n5]]"},
		{protocol.Strategy{Canary: "1"}, "[[n0] [n1 n2 n3 n4 n5]]"},
		{protocol.Strategy{Canary: "0", Batch: "4"}, "[[n0 n1 n2 n3] [n4 n5]]"},
		{protocol.Strategy{Canary: "1", Batch: "50%"}, "[[n0] [n1 n2 n3] [n4 n5]]"},
		{protocol.Strategy{Canary: "1", Order: []string{"db", "web"}}, "[[n1] [n4] [n0 n2 n5] [n3]]"},
		{protocol.Strategy{Batch: "2", Order: []string{"web"}}, "[[n0 n2] [n5] [n1 n3] [n4]]"},
		{protocol.Strategy{Canary: "100%", Order: []string{"db"}}, "[[n1 n4] [n0 n2 n3 n5]]"},
	} {
		var got [][]string
		for _, wave := range wavesOf(nodes, c.s) {
			got = append(got, namesOfRotating(wave))
		}
		if fmt.Sprint(got) != c.want {
			t.Errorf("%+v: %v, want %s", c.s, got, c.want)
		}
	}
	if wavesOf(nil, protocol.Strategy{Canary: "1"}) != nil {
		t.Error("waves of nobody")
	}
}

// TestRotationFailureRestores: where a node can't take the new value, those that have it get the old one back.
func TestRotationFailureRestores(t *testing.T) {
	s, h := newRotated(t)
	old := map[string]string{"web1": "old", "web2": "old", "db1": "old"}
	h.say(func(node, value string) error {
		if node == "web2" && value == "new" {
			return protocol.Refuse(protocol.Failed, "app.service failed; the old value is back")
		}
		return nil
	})
	s.stdin = "new"
	r := s.run("secrets", "rotate", "s", "--order", "@db", "--batch", "1")
	if r.status != SomeFailed || !strings.Contains(r.stderr, "its old value is back everywhere, and stays in the project") || !strings.Contains(r.stderr, "refused: web2: app.service failed") {
		t.Errorf("%+v", r)
	}
	h.hold(old)
	if got := h.ordered(); !slices.Equal(got[:3], []string{"db1 new", "web1 new", "web2 new"}) || len(got) != 5 {
		t.Errorf("ordered %q", got)
	}
	if s.value("s") != "old" || s.run("secrets", "rotate", "s", "--undo").status != Refused {
		t.Error("the project has something else than the old value")
	}
	// The first one ends it before anybody else got it.
	h.say(func(node, value string) error {
		if node == "db1" && value == "new" {
			return protocol.Refuse(protocol.Failed, "no")
		}
		return nil
	})
	s.stdin = "new"
	if r := s.run("secrets", "rotate", "s"); r.status != SomeFailed {
		t.Errorf("%+v", r)
	}
	if got := h.ordered(); !slices.Equal(got, []string{"db1 new"}) {
		t.Errorf("ordered %q", got)
	}
	// Unless some may fail.
	s.stdin = "new"
	r = s.run("secrets", "rotate", "s", "--max-failures", "1")
	if r.status != SomeFailed || !strings.Contains(r.stderr, "1 node kept the old value of s, until the next deploy:") || !strings.Contains(r.stderr, "db1: no") {
		t.Errorf("%+v", r)
	}
	h.hold(map[string]string{"web1": "new", "web2": "new", "db1": "old"})
	if s.value("s") != "new" {
		t.Error("the project has the old value")
	}
}

// TestRotationThatCantBeTakenBack stays on record, and --undo tries again.
func TestRotationThatCantBeTakenBack(t *testing.T) {
	s, h := newRotated(t)
	h.say(func(node, value string) error {
		if node == "web2" || node == "db1" && value == "old" {
			return protocol.Refuse(protocol.Failed, "disk full")
		}
		return nil
	})
	s.stdin = "new"
	r := s.run("secrets", "rotate", "s", "--order", "@db,@web")
	if r.status != SomeFailed || !strings.Contains(r.stderr, "these may have the new value still") || !strings.Contains(r.stderr, "--undo") || !strings.Contains(r.stderr, "db1") {
		t.Errorf("%+v", r)
	}
	s.stdin = "newer"
	s.expect(Refused, "--resume goes on with its new value, --undo brings the old one back", "secrets", "rotate", "s")
	if r := s.run("deploy", "web1"); !strings.Contains(r.stderr, "a rotation of secret s was not finished") || unsealed(t, h.fleet, h.fleet.Manifest("web1"))["s"] != "old" {
		t.Errorf("a deploy: %+v", r)
	}
	if r := s.run("secrets", "check"); r.status != SomeFailed || !strings.Contains(r.out, "unfinished s") {
		t.Errorf("check: %+v", r)
	}
	h.say(nil)
	s.must("secrets", "rotate", "s", "--undo")
	h.hold(map[string]string{"web1": "old", "web2": "old", "db1": "old"})
	s.must("secrets", "check")
}

func TestRotateOffline(t *testing.T) {
	s, h := newRotated(t)
	h.nodes["web2"].Vanish()
	s.stdin = "new"
	r := s.run("secrets", "rotate", "s")
	if r.status != Unanswered || !strings.Contains(r.stderr, "get s by the next deploy: web2") {
		t.Errorf("%+v", r)
	}
	h.hold(map[string]string{"web1": "new", "web2": "old", "db1": "new"})
	if s.value("s") != "new" {
		t.Error("the project has the old value")
	}
	for _, n := range []string{"web1", "db1"} {
		h.nodes[n].Vanish()
	}
	s.stdin = "newer"
	if r := s.run("secrets", "rotate", "s"); r.status != Unanswered || !strings.Contains(r.stderr, "nothing was changed") || s.value("s") != "new" {
		t.Errorf("%+v", r)
	}
}

// TestRotateSilent: a node that is gone in the middle may have either value, and counts as failed.
func TestRotateSilent(t *testing.T) {
	s, h := newRotated(t)
	h.nodes["web2"].Silence()
	s.stdin = "new"
	r := s.run("secrets", "rotate", "s", "--order", "@db,@web", "--json")
	if r.status != SomeFailed || s.value("s") != "old" {
		t.Errorf("%+v", r)
	}
	h.hold(map[string]string{"web1": "old", "web2": "old", "db1": "old"})
	states := map[string][]string{}
	var end rotationEnd
	for line := range strings.Lines(r.out) {
		var d rotationDocument
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			t.Fatal(err)
		}
		if d.Event == "end" {
			if err := json.Unmarshal([]byte(line), &end); err != nil {
				t.Fatal(err)
			}
			continue
		}
		states[d.Node] = append(states[d.Node], d.State)
	}
	if !slices.Equal(states["web2"], []string{"silent", "not-restored"}) || !slices.Equal(states["db1"], []string{"rotated", "restored"}) {
		t.Errorf("states %v", states)
	}
	if end.Outcome != "unfinished" || !slices.Equal(end.Failed, []string{"web2"}) {
		t.Errorf("end %+v", end)
	}
}

// TestRotateNotGivenYet: a node that has not been deployed to since its file names the secret keeps nobody from it.
func TestRotateNotGivenYet(t *testing.T) {
	s, h := newRotated(t)
	h.say(func(node, value string) error {
		if node == "web2" {
			return protocol.Refuse(protocol.Unknown, "it has no secret s")
		}
		return nil
	})
	if out := s.pipe("new", "secrets", "rotate", "s"); !strings.Contains(out, "web2: later: it has not been given this secret yet") || s.value("s") != "new" {
		t.Errorf("it says\n%s", out)
	}
}

// TestRotateInterrupted: Ctrl-C in the middle leaves both values, and --resume goes on.
func TestRotateInterrupted(t *testing.T) {
	s, h := newRotated(t)
	ctx, interrupt := context.WithCancel(t.Context())
	h.say(func(node, value string) error {
		if node == "web1" {
			interrupt()
		}
		return nil
	})
	s.stdin = "new"
	r := s.runContext(ctx, &bytes.Buffer{}, "secrets", "rotate", "s", "--order", "@db,@web", "--batch", "1")
	if r.status != Interrupted || !strings.Contains(r.stderr, "--resume goes on with it, --undo brings the old value back") {
		t.Errorf("%+v", r)
	}
	if s.value("s") != "old" || slices.Contains(h.ordered(), "web2 new") {
		t.Errorf("it went on: %q", h.ordered())
	}
	h.say(nil)
	s.must("secrets", "rotate", "s", "--resume")
	h.hold(map[string]string{"web1": "new", "web2": "new", "db1": "new"})
	if s.value("s") != "new" {
		t.Error("the project has the old value")
	}
}

func TestRotateDue(t *testing.T) {
	s, h := newRotated(t)
	settings := s.read("nix-infra.yaml")
	for _, name := range []string{"byhand", "young"} {
		s.pipe("x", "secrets", "store", name)
	}
	s.write("nix-infra.yaml", settings+"secrets: {s: {max_age: 30d, generate: 24}, byhand: {max_age: 30d}, young: {max_age: 30d, generate: 24}}\n")
	if out := s.must("secrets", "rotate", "--due"); !strings.Contains(out, "no secret is due") {
		t.Error(out)
	}
	s.write("secrets/.changed.json", `{"s": "2024-01-02T03:04:05Z", "byhand": "2024-01-02T03:04:05Z", "young": "`+time.Now().UTC().Format(time.RFC3339)+`"}`)
	r := s.run("secrets", "rotate", "--due")
	if r.status != SomeFailed || !strings.Contains(r.stderr, "byhand is due, and can't be made up") {
		t.Errorf("%+v", r)
	}
	now := s.value("s")
	if len(now) != 32 || s.value("young") != "x" || s.value("byhand") != "x" {
		t.Errorf("s is %q, young %q, byhand %q", now, s.value("young"), s.value("byhand"))
	}
	h.hold(map[string]string{"web1": now, "web2": now, "db1": now})
	if strings.Contains(r.out+r.stderr, now) {
		t.Error("the new value is printed")
	}
}

// TestRotateFromAction: what an action prints becomes the secret's value on the nodes, and is not shown.
func TestRotateFromAction(t *testing.T) {
	s, h := newRotated(t)
	s.write("app_modules/mongodb/action.sh", "echo action\n")
	actor(t, h.fleet, h.fleet.Add("made"), func([]string, map[string]string) (string, string, int) { return "made-here\n", "", 0 })
	args := []string{"action", "made", "--app-module=mongodb", "--cmd=create", "--rotate"}
	s.expect(Refused, "--rotate goes with --save-as-secret", args...)
	out := s.must(append(args, "--save-as-secret=s")...)
	h.hold(map[string]string{"web1": "made-here", "web2": "made-here", "db1": "made-here"})
	if s.value("s") != "made-here" || strings.Contains(out, "made-here") {
		t.Errorf("it says\n%s", out)
	}
	s.must(append(args, "--save-as-secret=fresh")...)
	if s.value("fresh") != "made-here" {
		t.Error("one that was not there is not stored")
	}
	h.say(func(node, value string) error { return protocol.Refuse(protocol.Failed, "no") })
	s.pipe("kept", "secrets", "store", "s")
	if r := s.run(append(args, "--save-as-secret=s")...); r.status != SomeFailed || s.value("s") != "kept" {
		t.Errorf("%+v", r)
	}
}
