package fleet

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// nodeRow is a node.
type nodeRow struct {
	Node         string     `json:"node"`
	State        string     `json:"state" jsonschema:"new, lost, pending, idle, or how far it is with its last deployment"`
	Online       bool       `json:"online"`
	IPv4         string     `json:"ipv4,omitempty"`
	Tags         []string   `json:"tags,omitempty"`
	System       string     `json:"system,omitempty"`
	NixOS        string     `json:"nixos,omitempty"`
	Deployment   string     `json:"deployment,omitempty" jsonschema:"the last one that it accepted"`
	Generation   int        `json:"generation,omitempty"`
	Reason       string     `json:"reason,omitempty" jsonschema:"of a deployment that did not end well"`
	FailedUnits  []string   `json:"failed_units,omitempty"`
	Drift        string     `json:"drift,omitempty" jsonschema:"why it does not run what was deployed to it"`
	Locked       string     `json:"locked,omitempty"`
	RebootNeeded bool       `json:"reboot_needed,omitempty"`
	LastSeen     *time.Time `json:"last_seen,omitempty"`
}

func rowOf(n *protocol.NodeState) nodeRow {
	r := nodeRow{Node: n.Name, State: state(n), Online: n.Online, IPv4: n.IPv4, Tags: n.Tags, System: n.System, LastSeen: n.LastSeen, Drift: n.Drift()}
	if l := n.Lock; l != nil {
		r.Locked = "by " + l.By + ": " + l.Reason
	}
	if b := n.Beat; b != nil {
		r.NixOS, r.Deployment, r.Generation, r.Reason, r.FailedUnits, r.RebootNeeded = b.NixOS, b.Deployment, b.Generation, b.Reason, b.FailedUnits, b.RebootNeeded
		if b.System != "" {
			r.System = b.System
		}
		if r.IPv4 == "" {
			r.IPv4 = b.IPv4
		}
	}
	return r
}

// state is a node's in a word. A phase that is none is what nobody but the node says, and it is not put among our own words.
func state(n *protocol.NodeState) string {
	s := n.State()
	switch p := protocol.Phase(s); {
	case slices.Contains([]string{"new", "lost", "pending", "idle"}, s), p.Ended(),
		slices.Contains([]protocol.Phase{protocol.Accepted, protocol.Fetching, protocol.Building, protocol.Activating, protocol.Checking, protocol.Confirming, protocol.Rebooting, protocol.RollingBack}, p):
		return s
	}
	return "unknown"
}

// words are what is worth a word of a node beside its state.
func (r *nodeRow) words() string {
	var words []string
	say := func(is bool, text string) {
		if is {
			words = append(words, text)
		}
	}
	say(r.Deployment != "", "deployment "+r.Deployment)
	say(len(r.FailedUnits) > 0, "failed units: "+some(r.FailedUnits))
	say(r.Drift != "", "drift: "+r.Drift)
	say(r.Locked != "", "locked "+r.Locked)
	say(r.RebootNeeded, "reboot needed")
	say(!r.Online, "last seen "+ago(r.LastSeen))
	say(r.Reason != "" && r.Drift == "", "reason: "+r.Reason)
	return strings.Join(words, "; ")
}

func ago(t *time.Time) string {
	if t == nil {
		return "never"
	}
	return t.UTC().Format(time.RFC3339) + fmt.Sprintf(" (%v ago)", time.Since(*t).Round(time.Second))
}

func (f *Fleet) addNodes(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "list-available-nodes", Title: "List nodes", Toolset: setFleet, Role: protocol.Viewer,
		Description: "List the nodes of the fleet: names, addresses, tags and states. Their names are what the input target of other tools takes. Begin here.",
	}, func(ctx context.Context, c *mcp.Call, in targetInput) (*mcp.Answer[nodeRow], error) {
		return f.listNodes(ctx, c, in, func(r *nodeRow) string {
			return fmt.Sprintf("name: %s; ip: %s; state: %s; tags: %s", r.Node, r.IPv4, r.State, strings.Join(r.Tags, " "))
		}, func(*nodeRow) bool { return true })
	})
	mcp.Add(s, mcp.Tool{
		Name: "fleet-status", Title: "How the fleet is", Toolset: setFleet, Role: protocol.Viewer,
		Description: "How all nodes are, or those of target: in sum first (states, nodes that are lost, units that failed, drift, reboots that are needed), then node by node: " +
			"what runs, what failed and why. With only_trouble, nodes without any are left out.",
	}, func(ctx context.Context, c *mcp.Call, in struct {
		targetInput
		OnlyTrouble bool `json:"only_trouble,omitempty" jsonschema:"only nodes that are lost, failed, drift, are locked or have failed units"`
	}) (*mcp.Answer[nodeRow], error) {
		return f.listNodes(ctx, c, in.targetInput, func(r *nodeRow) string { return fmt.Sprintf("%s: %s; %s", r.Node, r.State, r.words()) },
			func(r *nodeRow) bool { return !in.OnlyTrouble || r.troubled() })
	})
	mcp.Add(s, mcp.Tool{
		Name: "drift", Title: "Nodes that drift", Toolset: setFleet, Role: protocol.Viewer,
		Description: "Which nodes don't run what was deployed to them, and why: the deployment was rolled back or failed, somebody switched on the node itself, or an older generation was booted.",
	}, func(ctx context.Context, c *mcp.Call, in targetInput) (*mcp.Answer[nodeRow], error) {
		return f.listNodes(ctx, c, in, func(r *nodeRow) string { return r.Node + ": " + r.Drift }, func(r *nodeRow) bool { return r.Drift != "" })
	})
}

func (r *nodeRow) troubled() bool {
	return !r.Online || len(r.FailedUnits) > 0 || r.Drift != "" || r.Locked != "" || r.State == string(protocol.FailedPhase) || r.State == string(protocol.RolledBack)
}

// listNodes makes an answer of the nodes that count, a line each.
func (f *Fleet) listNodes(ctx context.Context, c *mcp.Call, in targetInput, line func(*nodeRow) string, counts func(*nodeRow) bool) (*mcp.Answer[nodeRow], error) {
	s, err := f.session(ctx, c)
	if err != nil {
		return nil, err
	}
	nodes, err := listNodes(ctx, s)
	if err == nil && strings.TrimSpace(in.Target) != "" {
		nodes, err = f.Select(nodes, []string{in.Target})
	}
	if err != nil {
		return nil, err
	}
	a := &mcp.Answer[nodeRow]{Summary: summaryOf(nodes)}
	for i := range nodes {
		if r := rowOf(&nodes[i]); counts(&r) {
			a.Parts = append(a.Parts, mcp.Part[nodeRow]{Text: strings.TrimSuffix(line(&r), "; "), Untrusted: true, Row: &r})
		}
	}
	if len(a.Parts) == 0 && len(nodes) > 0 {
		a.Summary += " None is to be listed."
	}
	return a, nil
}

// summaryOf is nodes in a few sentences.
func summaryOf(nodes []protocol.NodeState) string {
	if len(nodes) == 0 {
		return "There are no nodes."
	}
	states := map[string]int{}
	var lost, failing, drifting, locked, rebooting []string
	for i := range nodes {
		r := rowOf(&nodes[i])
		states[r.State]++
		for _, group := range []struct {
			is    bool
			names *[]string
		}{{r.State == "lost", &lost}, {len(r.FailedUnits) > 0, &failing}, {r.Drift != "", &drifting}, {r.Locked != "", &locked}, {r.RebootNeeded, &rebooting}} {
			if group.is {
				*group.names = append(*group.names, r.Node)
			}
		}
	}
	var counts []string
	for _, state := range slices.Sorted(maps.Keys(states)) {
		counts = append(counts, fmt.Sprintf("%d %s", states[state], state))
	}
	text := fmt.Sprintf("%s: %s.", plural(len(nodes), "node"), strings.Join(counts, ", "))
	for _, group := range []struct {
		says  string
		names []string
	}{{"Lost", lost}, {"With failed units", failing}, {"Drifting", drifting}, {"Locked", locked}, {"A reboot is needed on", rebooting}} {
		if len(group.names) > 0 {
			text += fmt.Sprintf(" %s: %s.", group.says, some(group.names))
		}
	}
	return text
}
