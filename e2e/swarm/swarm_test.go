//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// TestMain is also the process of the agents, as main is.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == agentsCommand {
		end(runAgents(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// TestSwarm: a small one does all that the large one measures, also after it has grown. That every node confirmed is
// what the CLI's exit status says, and what the nodes answer.
func TestSwarm(t *testing.T) {
	f, err := newFleet(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer f.close()
	for _, n := range []int{5, 12} {
		if _, _, err := f.grow(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	if len(f.agents) != 2 {
		t.Errorf("%d processes of agents", len(f.agents))
	}
	const rounds = 50 // the kernel counts CPU time in hundredths of a second: fewer may cost a fast machine nothing that it sees
	for _, query := range queries {
		q, err := f.inquire(t.Context(), rounds, usage{}, query.ask)
		if err != nil {
			t.Fatalf("%s: %v", query.name, err)
		}
		if len(q.rounds) != rounds || q.lost != 0 || q.rounds[0] <= 0 || q.used.controller == 0 || q.used.agents == 0 {
			t.Errorf("%s: %+v", query.name, q)
		}
	}
	a, err := f.assistant(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	for _, c := range calls {
		if m, err := f.measureCall(t.Context(), a, c.tool, c.inputs, 2); err != nil || len(m.rounds) != 2 || m.pages != 1 || m.largest == 0 {
			t.Errorf("%s: %+v, %v", c.name, m, err)
		}
	}
	for i, d := range deploys {
		m, err := f.deploy(t.Context(), d.args...)
		if err != nil {
			t.Fatalf("%s: %v", d.name, err)
		}
		if m.took == 0 || m.controller == 0 || m.cli == 0 || m.peak == 0 || m.revisions < 12 {
			t.Errorf("%s: %+v", d.name, m)
		}
		answers := 0
		silent, err := f.admin.Broadcast(t.Context(), protocol.Facts, nil, f.nodes, func(node string, r *protocol.Reply, err error) {
			var b protocol.Beat
			if err == nil {
				err = json.Unmarshal(r.Body, &b)
			}
			if built := closureOf(node, 1); err != nil || b.Closure != built || b.Generation != 2 || b.Phase != protocol.Confirmed {
				t.Errorf("%s, after deploy %d: %v; %s runs, of generation %d, %s", node, i, err, b.Closure, b.Generation, b.Phase)
			}
			answers++
		})
		if err != nil || len(silent) > 0 || answers != 12 {
			t.Errorf("after deploy %d: %v, %d answers, none from %v", i, err, answers, silent)
		}
	}
}

// TestQuantiles: of ten rounds the fifth is the median, and the last one is what 99% of them end within.
func TestQuantiles(t *testing.T) {
	q := inquiry{}
	for i := range 10 {
		q.rounds = append(q.rounds, time.Duration(i+1))
	}
	if p50, p99 := q.at(0.5), q.at(0.99); p50 != 5 || p99 != 10 {
		t.Errorf("p50 %d, p99 %d", p50, p99)
	}
}

// TestSSH: every exec is counted, and sshd's sessions are in what they cost.
func TestSSH(t *testing.T) {
	var out strings.Builder
	each, err := measureSSH(t.Context(), &out, t.TempDir(), 20)
	if errors.Is(err, errNoSSHD) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if each < time.Millisecond {
		t.Errorf("an exec takes %v of CPU", each)
	}
	t.Log("\n" + out.String())
}
