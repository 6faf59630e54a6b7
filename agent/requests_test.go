package agent_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/reconcile"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

// answer asks the node and decodes what it answers.
func answer[T any](t *testing.T, f *testfleet.Fleet, who *protocol.Signer, a protocol.Action, payload any) T {
	t.Helper()
	reply := ask(t, f, who, "ann", a, payload)
	var body T
	if reply.Refused != nil {
		t.Fatalf("%s: %s", a, reply.Refused.Reason)
	}
	if err := json.Unmarshal(reply.Body, &body); err != nil {
		t.Fatalf("%s: %v", a, err)
	}
	return body
}

// withGenerations is a node whose profile has the generations 9 (which runs) down to 5.
func withGenerations(t *testing.T, f *testfleet.Fleet, change ...func(*agent.Options)) (*side, *running) {
	t.Helper()
	s := control(t, f)
	r := start(t, enrolled(t, f), change...)
	testfleet.Eventually(t, "a beat", func() bool { _, n := s.lastBeat(); return n > 0 })
	r.host.mu.Lock()
	defer r.host.mu.Unlock()
	for n, name := range map[int]string{9: "old", 8: "eight", 7: "seven", 6: "booted", 5: "five"} {
		r.host.generations = append(r.host.generations, nix.Generation{Number: n, Closure: systemPath(name), Created: time.Now().Add(time.Duration(n-10) * time.Hour).UTC()})
	}
	slices.SortFunc(r.host.generations, func(a, b nix.Generation) int { return b.Number - a.Number })
	return s, r
}

func numbers(all []protocol.Generation) []int {
	var n []int
	for _, g := range all {
		n = append(n, g.Number)
	}
	return n
}

func TestGenerationsAndGarbage(t *testing.T) {
	f := testfleet.New(t)
	s, r := withGenerations(t, f)
	viewer, ann := f.User("ann", protocol.Viewer), f.User("ann", protocol.Deployer)
	list := answer[protocol.GenerationList](t, f, viewer, protocol.ListGenerations, nil).Generations
	if fmt.Sprint(numbers(list)) != "[9 8 7 6 5]" || !list[0].Running || !list[0].Current || list[0].Booted || !list[3].Booted || list[3].Running || list[4].Created.IsZero() {
		t.Errorf("generations %+v", list)
	}

	// 8 is where a rollback would go to: the newest of another closure. 6 was booted.
	dry := answer[protocol.GarbageReport](t, f, ann, protocol.CollectGarbage, protocol.GarbageRequest{DryRun: true})
	if fmt.Sprint(numbers(dry.Removed)) != "[7 5]" || dry.Kept != 3 || dry.Paths != 0 || dry.Freed != 0 {
		t.Errorf("dry run: %+v", dry)
	}
	if acted := r.host.taken(); len(acted) != 0 {
		t.Errorf("a dry run did %v", acted)
	}
	report := answer[protocol.GarbageReport](t, f, ann, protocol.CollectGarbage, protocol.GarbageRequest{Keep: 3})
	if fmt.Sprint(numbers(report.Removed)) != "[5]" || report.Removed[0].Closure != systemPath("five") || report.Kept != 4 || report.Paths != 12 || report.Freed != 3456 {
		t.Errorf("report %+v", report)
	}
	// The boot menu is without them before what it offered is deleted.
	if acted := fmt.Sprint(r.host.taken()); acted != "[delete [5] run nix-infra-boot-menu.service collect]" {
		t.Errorf("did %s", acted)
	}

	// Where the menu can't be written, it goes on offering them: nothing is deleted.
	r.host.mu.Lock()
	r.host.exit = 1
	r.host.mu.Unlock()
	if reply := ask(t, f, ann, "ann", protocol.CollectGarbage, protocol.GarbageRequest{}); reply.Refused == nil || !strings.Contains(reply.Refused.Reason, "the boot menu still offers it") {
		t.Errorf("without a boot menu: %+v", reply)
	}
	if acted := fmt.Sprint(r.host.taken()); acted != "[delete [7] run nix-infra-boot-menu.service]" {
		t.Errorf("did %s", acted)
	}

	for _, payload := range []any{protocol.GarbageRequest{Keep: -1}, protocol.GarbageRequest{OlderThan: -1}, "all"} {
		if reply := ask(t, f, ann, "ann", protocol.CollectGarbage, payload); reply.Refused == nil || reply.Refused.Code != protocol.Malformed {
			t.Errorf("%v: %+v", payload, reply)
		}
	}
	testfleet.Eventually(t, "the audit stream", func() bool { return len(s.audited(t)) == 14 })
	for i, a := range s.audited(t) {
		if (i%2 == 0) != (a.Outcome == "") || i >= 2 && a.Action != protocol.CollectGarbage {
			t.Errorf("record %d: %+v", i, a)
		}
	}
}

// Only one collects garbage at a time, and the others are told so at once.
func TestOneGarbageCollection(t *testing.T) {
	f := testfleet.New(t)
	_, r := withGenerations(t, f)
	ann := f.User("ann", protocol.Deployer)
	r.host.collecting = make(chan struct{})
	first := make(chan protocol.Reply, 1)
	nc := f.Connect(ann, "")
	defer nc.Close()
	signed, id, err := ann.Request(protocol.CollectGarbage, node, protocol.GarbageRequest{}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	sub, err := nc.SubscribeSync(protocol.ReplySubject("ann", id, node))
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.PublishRequest(protocol.RequestSubject(node, protocol.CollectGarbage), protocol.ReplySubject("ann", id, node), protocol.Encode(signed)); err != nil {
		t.Fatal(err)
	}
	go func() {
		if m, err := sub.NextMsg(30 * time.Second); err == nil {
			reply, _ := protocol.Decode[protocol.Reply](m.Data)
			first <- reply
		}
		close(first)
	}()
	testfleet.Eventually(t, "garbage is collected", func() bool { return slices.Contains(r.host.seen(), "collect") })
	if reply := ask(t, f, ann, "ann", protocol.CollectGarbage, protocol.GarbageRequest{}); reply.Refused == nil || reply.Refused.Code != protocol.Conflict || !strings.Contains(reply.Refused.Reason, "try again later") {
		t.Errorf("a second one: %+v", reply)
	}
	close(r.host.collecting)
	if reply := <-first; reply.Refused != nil || len(reply.Body) == 0 {
		t.Errorf("the first one: %+v", reply)
	}
	if reply := ask(t, f, ann, "ann", protocol.CollectGarbage, protocol.GarbageRequest{}); reply.Refused != nil {
		t.Errorf("after the first one: %+v", reply.Refused)
	}
}

func TestOwnFiles(t *testing.T) {
	f := testfleet.New(t)
	const facts = `{"v":1}`
	var broken atomic.Bool
	_, r := withGenerations(t, f, func(o *agent.Options) {
		folders := o.Deploy
		o.Deploy = func(r *reconcile.Options) {
			folders(r)
			r.Facts = func(context.Context) ([]byte, error) {
				if broken.Load() {
					return nil, errors.New("no Nix")
				}
				return []byte(facts), nil
			}
		}
	})
	ann := f.User("ann", protocol.Deployer)
	write := func(name string, size int) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(r.etc, name), []byte(strings.Repeat("x", size)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("networking.nix", 100)
	write("secret.nix", 10)
	files := answer[protocol.FileList](t, f, ann, protocol.OwnFiles, nil).Files
	if len(files) != 2 || len(files["networking.nix"]) != 100 || string(files[protocol.FactsFile]) != facts {
		t.Errorf("files %v", files)
	}
	broken.Store(true)
	refused := func(what string) {
		t.Helper()
		if reply := ask(t, f, ann, "ann", protocol.OwnFiles, nil); reply.Refused == nil || reply.Refused.Code != protocol.Failed || !strings.Contains(reply.Refused.Reason, "hardware-configuration.nix") {
			t.Errorf("%s: %+v", what, reply)
		}
	}
	file := filepath.Join(r.etc, "hardware-configuration.nix")
	if err := os.Symlink("secret.nix", file); err != nil {
		t.Fatal(err)
	}
	refused("a link")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(file, 0o755); err != nil {
		t.Fatal(err)
	}
	refused("a folder")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	write("hardware-configuration.nix", 1<<20)
	refused("a file without end")
	write("hardware-configuration.nix", 0)
	if files := answer[protocol.FileList](t, f, ann, protocol.OwnFiles, nil).Files; len(files) != 2 {
		t.Errorf("files %v", files)
	}
}
