package controller

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
)

// However many nodes fail with long logs, all of it can be had, a part at a time.
func TestLargeDeploymentIsShownInParts(t *testing.T) {
	t.Parallel()
	const nodes = 200
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	items := map[string]store.Entry{}
	for i := range nodes {
		items[fmt.Sprintf("n%03d", i)] = store.Entry{Serial: 1, Digest: protocol.Digest(nil), Wave: 1, Released: time.Now()}
	}
	current := r.c.current.Load()
	d := store.Deployment{ID: "d1", By: "anna", Created: time.Now(), Mode: protocol.Switch}
	must(t, current.lead.Accept(t.Context(), d, items, nil))
	for node, e := range items {
		e.Report = &protocol.Report{Deployment: "d1", Serial: 1, Phase: protocol.FailedPhase, Reason: "it broke",
			Log: strings.Repeat("x", protocol.MaxReportLog), FailedUnits: []string{"a.service"}}
		must(t, current.lead.PutEntry(t.Context(), "d1", node, e))
		items[node] = e
	}
	current.fleet.accepted(d, items, nil)

	all := func(q protocol.DeploymentQuery) (parts int, results map[string]protocol.NodeResult) {
		results = map[string]protocol.NodeResult{}
		for q.ID = "d1"; parts == 0 || q.After != ""; parts++ {
			d := asked[protocol.Deployment](t, admin, protocol.ShowDeployment, q)
			if n := len(protocol.Encode(d)); n > maxShownBytes+64<<10 || d.Count[protocol.FailedPhase] != nodes {
				t.Fatalf("a part has %d bytes, and counts %v", n, d.Count)
			}
			maps.Copy(results, d.Nodes)
			q.After = d.Next
		}
		return parts, results
	}
	if parts, got := all(protocol.DeploymentQuery{}); parts != 2 || len(got) != nodes || len(got["n199"].Report.Log) != protocol.MaxReportLog {
		t.Errorf("%d nodes in %d parts", len(got), parts)
	}
	parts, got := all(protocol.DeploymentQuery{Brief: true})
	if b := got["n007"].Report; parts != 1 || len(got) != nodes || b.Log != "" || b.FailedUnits != nil || b.Reason == "" {
		t.Errorf("in brief: %d nodes in %d parts, %+v", len(got), parts, b)
	}
	parts, got = all(protocol.DeploymentQuery{Names: []string{"n007", "nobody", "n003", "n007"}})
	if parts != 1 || len(got) != 2 || got["n007"].Report.Log == "" || got["n003"].Report == nil {
		t.Errorf("by name: %d nodes in %d parts", len(got), parts)
	}
	_, err := admin.ask(protocol.ShowDeployment, protocol.DeploymentQuery{ID: "d9"})
	wantCode(t, err, protocol.Unknown)
}

func TestPaceSlowsDownInARush(t *testing.T) {
	var p pace
	now := time.Unix(1000, 0)
	var sent int64
	for range 1000 {
		sent += p.next(now)
	}
	if sent > 2*fullPace {
		t.Errorf("%d bytes for a thousand requests in a second", sent)
	}
	if p.next(now.Add(time.Second)) != protocol.ChunkSize {
		t.Error("still slow a second later")
	}
}

func TestLimiter(t *testing.T) {
	l := limiter{every: time.Second, burst: 3}
	now := time.Unix(1000, 0)
	passed := 0
	for range 100 {
		if ok, _ := l.allow(now); ok {
			passed++
		}
	}
	if ok, held := l.allow(now.Add(time.Second)); passed != 3 || !ok || held != 97 {
		t.Errorf("%d passed, then %v with %d held back", passed, ok, held)
	}
}
