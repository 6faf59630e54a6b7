package controller

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestFitLeavesOutLogsFirst(t *testing.T) {
	t.Parallel()
	fleet := func(nodes, log int) protocol.Deployment {
		d := protocol.Deployment{ID: "d1", Nodes: map[string]protocol.NodeResult{}}
		for i := range nodes {
			d.Nodes[fmt.Sprintf("n%d", i)] = protocol.NodeResult{Phase: protocol.FailedPhase, Serial: 1,
				Report: &protocol.Report{Deployment: "d1", Phase: protocol.FailedPhase, Reason: "it broke", Log: strings.Repeat("x", log),
					Before: strings.Repeat("b", 90), Closure: strings.Repeat("c", 90)}}
		}
		return fit(d)
	}
	if d := fleet(10, 1000); d.Nodes["n3"].Report.Log[0] != 'x' {
		t.Error("a small answer was cut")
	}
	d := fleet(1000, protocol.MaxReportLog)
	if r := d.Nodes["n3"].Report; !strings.Contains(r.Log, "left out") || r.Before == "" {
		t.Errorf("%+v", r)
	}
	d = fleet(8000, 300)
	if r := d.Nodes["n3"].Report; r == nil || r.Reason == "" || r.Before != "" {
		t.Errorf("%+v", r)
	}
	for _, nodes := range []int{8000, 20_000} {
		if n := len(protocol.Encode(fleet(nodes, 300))); n > maxShownBytes {
			t.Errorf("%d nodes take %d bytes", nodes, n)
		}
	}
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
