package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/nix-infra/nix-infra/controller/rollout"
	"github.com/nix-infra/nix-infra/protocol"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(context.Background(), Config{Dir: dir}, quiet())
	must(t, err)
	return s
}

func campaign(t testing.TB, s *Store, name string) *Term {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	term, err := s.Campaign(ctx, name)
	must(t, err)
	return term
}

// Only the leader writes, and a deposed one does not know it before it tries.
func TestOnlyTheLeaderWrites(t *testing.T) {
	s := open(t, t.TempDir())
	defer s.Close()
	ctx := context.Background()
	first := campaign(t, s, "ctl1")
	must(t, first.PutNode(ctx, protocol.NodeRecord{Name: "n1"}))

	waiting, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if _, err := s.Campaign(waiting, "ctl2"); err == nil {
		t.Fatal("two lead")
	}
	// The same controller, started again after a kill, need not wait for its own session.
	second := campaign(t, s, "ctl1")
	if err := first.PutNode(ctx, protocol.NodeRecord{Name: "n2"}); !errors.Is(err, ErrNotLeader) {
		t.Fatalf("a deposed leader wrote: %v", err)
	}
	must(t, second.Resign(ctx))
	third := campaign(t, s, "ctl2")
	must(t, third.PutNode(ctx, protocol.NodeRecord{Name: "n3"}))
	nodes, err := s.Nodes(ctx)
	must(t, err)
	if len(nodes) != 2 {
		t.Fatalf("%v", nodes)
	}
}

func TestLargeDeployment(t *testing.T) {
	s := open(t, t.TempDir())
	defer s.Close()
	ctx := context.Background()
	term := campaign(t, s, "ctl1")
	items := map[string]Entry{}
	for i := range 3000 {
		items[fmt.Sprintf("n%04d", i)] = Entry{Serial: 7, Digest: protocol.Digest([]byte{byte(i)})}
	}
	d := Deployment{ID: "d1", Mode: protocol.Switch}
	must(t, term.Accept(ctx, d, items, &rollout.Rollout{State: protocol.RolloutRunning}))
	must(t, term.Accept(ctx, Deployment{ID: "d1-b", Mode: protocol.DryActivate}, map[string]Entry{"n1": {}}, nil))
	desired := func() map[string]protocol.Desired {
		all, err := s.Desired(ctx)
		must(t, err)
		return all
	}
	entries, err := s.Entries(ctx, "d1")
	must(t, err)
	if len(desired()) != 0 || len(entries) != 3000 {
		t.Fatalf("%d desired, %d entries", len(desired()), len(entries))
	}
	batch := map[string]Entry{}
	for i := range MaxRelease {
		name := fmt.Sprintf("n%04d", i)
		e := items[name]
		e.Released = time.Now()
		batch[name] = e
	}
	must(t, term.Release(ctx, d, batch))
	if all := desired(); len(all) != MaxRelease || all["n0042"] != items["n0042"].Desired(d) {
		t.Fatalf("%d desired, %+v", len(all), all["n0042"])
	}
	if e, _, err := s.Entry(ctx, "d1", "n0042"); err != nil || e.Released.IsZero() {
		t.Fatalf("%+v, %v", e, err)
	}
	must(t, term.PutRollout(ctx, "d1", rollout.Rollout{State: protocol.RolloutPaused}))
	if all, err := s.Rollouts(ctx); err != nil || len(all) != 1 || all["d1"].State != protocol.RolloutPaused {
		t.Fatalf("%+v, %v", all, err)
	}
	must(t, term.PutEntry(ctx, "d1", "n0042", items["n0042"]))
	must(t, term.RemoveDeployment(ctx, "d1"))
	if err := term.PutEntry(ctx, "d1", "n0042", items["n0042"]); err == nil {
		t.Error("an entry of a deployment that was removed was written")
	}
	if left, err := s.Entries(ctx, "d1"); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	var ids []string
	must(t, s.Deployments(ctx, func(d Deployment) { ids = append(ids, d.ID) }, nil))
	if all, err := s.Rollouts(ctx); err != nil || len(all) != 0 || len(ids) != 1 || ids[0] != "d1-b" {
		t.Fatalf("left: %v, %v, %v", ids, all, err)
	}
}

func TestSightings(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	ctx := context.Background()
	term := campaign(t, s, "ctl1")
	if all, err := term.Sightings(ctx); err != nil || len(all) != 0 {
		t.Fatal(all, err)
	}
	at := time.Now().UTC().Truncate(time.Second)
	beat := protocol.Beat{Kernel: "6.18", Vitals: protocol.Vitals{Uptime: 5}}
	var all []Sighting
	for i := range 200 {
		all = append(all, Sighting{Node: fmt.Sprintf("n%d", i), Online: true, Seen: at, Beat: beat})
	}
	must(t, term.Save(ctx, all))
	must(t, term.Save(ctx, []Sighting{{Node: "n7", Seen: at.Add(time.Minute), Beat: beat}}))
	leases := func(s *Store) int {
		r, err := s.Client().Get(ctx, heartbeats, clientv3.WithPrefix())
		must(t, err)
		ids := map[int64]bool{}
		for _, kv := range r.Kvs {
			ids[kv.Lease] = true
		}
		if len(r.Kvs) != 199 {
			t.Fatalf("%d heartbeats", len(r.Kvs))
		}
		return len(ids)
	}
	if n := leases(s); n != leaseCount {
		t.Fatalf("%d leases", n)
	}
	// Another controller takes the leases over instead of writing everything again.
	s.Close()
	s = open(t, dir)
	defer s.Close()
	next := campaign(t, s, "ctl1")
	known, err := next.Sightings(ctx)
	must(t, err)
	if len(known) != 200 || !known["n8"].Online || known["n7"].Online || !known["n7"].Seen.Equal(at.Add(time.Minute)) ||
		known["n8"].Beat.Kernel != "6.18" || known["n8"].Beat.Vitals != (protocol.Vitals{}) {
		t.Fatalf("%+v, %+v", known["n7"], known["n8"])
	}
	if known["n7"].Unsure {
		t.Error("n7 was kept track of, and is lost for sure")
	}
	if next.leases != term.leases {
		t.Error("the leases are other ones")
	}
	// A lease that is gone is made anew, and said.
	_, err = s.Client().Revoke(ctx, next.leases[3])
	must(t, err)
	lost, err := next.Renew(ctx)
	if err != nil || len(lost) != 1 || lost[0] != 3 {
		t.Fatalf("%v, %v", lost, err)
	}
	// Where nobody kept track, a node that is not online may be there all the same.
	_, err = s.Client().Revoke(ctx, next.leases[LeaseOf("n7")])
	must(t, err)
	must(t, next.Resign(ctx))
	known, err = campaign(t, s, "ctl2").Sightings(ctx)
	must(t, err)
	if n := known["n7"]; n.Online || !n.Unsure {
		t.Errorf("%+v", n)
	}
}
