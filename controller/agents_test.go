package controller

import (
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// told is a manifest that an agent was given, or was done with.
type told struct {
	node, deployment string
	serial           uint64
	done             bool
}

// squad are nodes with agents that do what the controller says: they look when they are told, fetch their manifest and its
// blob, and end it as the test wants.
type squad struct {
	t     testing.TB
	nodes map[string]*machineNode

	busy    sync.WaitGroup
	mu      sync.Mutex
	resting bool                                         // nobody looks at anything any more
	ends    func(node, deployment string) protocol.Phase // "": not yet
	serials map[string]uint64
	log     []told
}

// squad enrols nodes that are online.
func (r *rig) squad(admin *person, names ...string) *squad {
	s := &squad{t: r.t, nodes: map[string]*machineNode{}, serials: map[string]uint64{}}
	for _, name := range names {
		s.join(r.node(admin, name))
	}
	r.knows(admin, names...)
	return s
}

func (s *squad) join(n *machineNode) {
	s.mu.Lock()
	s.nodes[n.name], s.resting = n, false
	s.mu.Unlock()
	s.t.Cleanup(s.rest) // before its connection ends
	value[*nats.Subscription](s.t)(n.nc.Subscribe(protocol.LookSubject(n.name), func(m *nats.Msg) { s.look(n, m.Data) }))
	n.beat(s.t, protocol.Beat{Interval: 120})
}

// end says how manifests end from now on.
func (s *squad) end(how func(node, deployment string) protocol.Phase) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ends = how
}

func always(p protocol.Phase) func(string, string) protocol.Phase {
	return func(string, string) protocol.Phase { return p }
}

// rest has the agents finish what they are at, so that their connections can be ended, and begin nothing else until one joins.
func (s *squad) rest() {
	s.mu.Lock()
	s.resting = true
	s.mu.Unlock()
	s.busy.Wait()
}

func (s *squad) look(n *machineNode, data []byte) {
	s.mu.Lock()
	if s.resting {
		s.mu.Unlock()
		return
	}
	s.busy.Add(1)
	s.mu.Unlock()
	defer s.busy.Done()
	l, err := protocol.Decode[protocol.Look](data)
	if err != nil {
		s.t.Errorf("%s was told %s", n.name, data)
		return
	}
	s.mu.Lock()
	known := l.Serial <= s.serials[n.name]
	if !known {
		s.serials[n.name] = l.Serial
	}
	s.mu.Unlock()
	if known {
		return
	}
	reply, err := n.ask(protocol.UpManifest, protocol.ManifestQuery{Digest: l.Digest})
	if err != nil {
		s.t.Errorf("%s can't have what it is to look at: %v", n.name, err)
		return
	}
	deployment, serial, err := manifestOf(reply.Body)
	if err != nil {
		s.t.Errorf("%s: %v", n.name, err)
		return
	}
	s.mu.Lock()
	s.log = append(s.log, told{node: n.name, deployment: deployment, serial: serial})
	end := protocol.Phase("")
	if s.ends != nil {
		end = s.ends(n.name, deployment)
	}
	s.mu.Unlock()
	if end != "" {
		s.finish(n.name, deployment, serial, end)
	}
}

func manifestOf(body []byte) (deployment string, serial uint64, err error) {
	var r protocol.ManifestReply
	if err := json.Unmarshal(body, &r); err != nil {
		return "", 0, err
	}
	signed, err := protocol.Decode[protocol.Signed](r.Manifest)
	if err != nil {
		return "", 0, err
	}
	m, err := protocol.Decode[protocol.Manifest](signed.Payload)
	return m.Deployment, m.Serial, err
}

// finish reports an end. The log has it before the controller can know.
func (s *squad) finish(node, deployment string, serial uint64, end protocol.Phase) {
	s.mu.Lock()
	s.log = append(s.log, told{node, deployment, serial, true})
	n := s.nodes[node]
	s.mu.Unlock()
	report := protocol.Report{Version: 1, Deployment: deployment, Serial: serial, Mode: protocol.Switch, Phase: end, Ended: time.Now()}
	if _, err := n.ask(protocol.UpReport, report); err != nil {
		s.t.Errorf("the report of %s: %v", node, err)
	}
	n.beat(s.t, protocol.Beat{Interval: 120, Serial: serial, Deployment: deployment, Phase: end})
}

// got are the nodes that were given a deployment's manifest, in order.
func (s *squad) got(deployment string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for _, e := range s.log {
		if e.deployment == deployment && !e.done {
			names = append(names, e.node)
		}
	}
	return names
}

// await waits until just these nodes were given a deployment's manifest.
func (s *squad) await(deployment string, names ...string) {
	s.t.Helper()
	slices.Sort(names)
	eventually(s.t, fmt.Sprintf("%v have %s", names, deployment), func() bool {
		got := s.got(deployment)
		slices.Sort(got)
		return slices.Equal(got, names)
	})
}

// names are n01 and so on.
func names(from, to int) []string {
	var all []string
	for i := from; i <= to; i++ {
		all = append(all, fmt.Sprintf("n%02d", i))
	}
	return all
}

// roll deploys by a strategy, with ways back where it needs them.
func (p *person) roll(t testing.TB, id string, serial uint64, s protocol.Strategy, nodes ...string) protocol.Deployment {
	t.Helper()
	return asked[protocol.Deployment](t, p, protocol.Deploy, p.rollRequest(t, id, serial, s, nodes...))
}

func (p *person) rollRequest(t testing.TB, id string, serial uint64, s protocol.Strategy, nodes ...string) protocol.DeployRequest {
	t.Helper()
	r := protocol.DeployRequest{Deployment: id, Mode: protocol.Switch, Strategy: s}
	for _, n := range nodes {
		item, _ := p.signedManifest(t, n, id, serial, protocol.Switch, "tree of "+n+" in "+id)
		if s.OnFailure == protocol.RollbackOnFailure {
			item.Back = p.upload(t, value[[]byte](t)(p.Signer.Manifest(wayBack(n, id, serial))))
		}
		r.Items = append(r.Items, item)
	}
	return r
}

func wayBack(node, deployment string, serial uint64) *protocol.Manifest {
	return &protocol.Manifest{Version: protocol.Version, Node: node, Serial: serial + 1, Deployment: protocol.BackID(deployment), Created: time.Now(),
		Mode: protocol.Switch, Attr: protocol.SystemAttr(node), Rollback: &protocol.Rollback{Before: deployment}, Timeout: 60, BuildTimeout: 60}
}

// stands waits until a rollout is in a state.
func (p *person) stands(t testing.TB, id string, want protocol.RolloutState) protocol.Deployment {
	t.Helper()
	var d protocol.Deployment
	eventually(t, fmt.Sprintf("%s is %s", id, want), func() bool {
		d = p.show(t, id)
		return d.Rollout.State == want
	})
	return d
}
