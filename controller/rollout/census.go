package rollout

import (
	"fmt"
	"strings"

	"github.com/nix-infra/nix-infra/protocol"
)

// census is a rollout's nodes, counted.
type census struct {
	nodes   int
	last    int // wave
	through bool
	waves   []struct { // from 1
		ready, busy int // nodes that hold it up: can be released, or are on their way and not lost
		released    int
	}
	held, quarantined, underway, succeeded int

	unavailable int
	failures    int
	failing     []string // the first few names
}

// namedFailures is how many nodes a line for people names.
const namedFailures = 3

func count(r *Rollout, nodes []Node) census {
	c := census{nodes: len(nodes)}
	for i := range nodes {
		c.last = max(c.last, nodes[i].Wave)
	}
	c.through = r.through(c.last)
	c.waves = make([]struct{ ready, busy, released int }, max(c.last, r.Wave)+1)
	for i := range nodes {
		n := &nodes[i]
		w := &c.waves[n.Wave]
		switch n.Status {
		case Held:
			c.held++
			if n.Quarantined {
				c.quarantined++
			}
			if n.ready() {
				w.ready++
			}
		case Underway:
			w.released++
			c.underway++
			c.unavailable++
			if !n.Lost {
				w.busy++
			}
		case Succeeded:
			w.released++
			c.succeeded++
			if !n.Online && !c.through {
				c.unavailable++
			}
		case Failed, Taken:
			w.released++
		}
		if n.Status == Failed || n.fault(c.through) != "" {
			if c.failures++; c.failures <= namedFailures {
				c.failing = append(c.failing, n.Name)
			}
		}
	}
	return c
}

// ready is the number of nodes that can be released in the waves up to one.
func (c *census) ready(wave int) int {
	n := 0
	for _, w := range c.waves[:wave+1] {
		n += w.ready
	}
	return n
}

// blame says in a line why a rollout does not go on.
func (c *census) blame(r *Rollout) string {
	names := strings.Join(c.failing, ", ")
	if more := c.failures - len(c.failing); more > 0 {
		names += fmt.Sprintf(" and %d more", more)
	}
	line := fmt.Sprintf("%d failed (%s), %d may", c.failures, names, r.Strategy.MaxFailures.Floor(c.nodes))
	if r.Forgiven > 0 {
		line += fmt.Sprintf(" beside the %d that were forgiven", r.Forgiven)
	}
	return line
}

func (c *census) outcome() string {
	return fmt.Sprintf("%d of %d nodes have it", c.succeeded, c.nodes)
}

// ready tells whether the node can be released when its turn comes.
func (n *Node) ready() bool {
	return n.Status == Held && n.Online && !n.Locked && !n.Quarantined
}

// fault is why a node that does not say so counts as failed; "" where it does not.
func (n *Node) fault(through bool) string {
	switch {
	case n.Status == Held && n.Quarantined:
		return "its closure is in quarantine, some node rolled back from it"
	case n.Status == Underway && n.Lost:
		return "lost on its way"
	case n.Status == Succeeded && !through && !n.Online:
		return "lost since it was confirmed"
	case n.Status == Succeeded && !through && n.Degraded:
		return "units failed since it was confirmed"
	}
	return ""
}

// passed is why a node that is no failure is passed over, or was when the rollout ended; "" where it is not.
func (n *Node) passed(s protocol.RolloutState) string {
	switch {
	case n.Status == Left || n.Status == Taken:
		return "removed, or a newer deployment has it"
	case n.Status != Held:
		return ""
	case s.Ended():
		return fmt.Sprintf("the rollout ended (%s) before its turn", s)
	case !n.Online:
		return "offline"
	case n.Locked:
		return "locked"
	}
	return ""
}

// explain tells of the nodes that count as failed or are passed over, and of no others.
func explain(s protocol.RolloutState, through bool, nodes []Node) (failing, passed map[string]string) {
	failing, passed = map[string]string{}, map[string]string{}
	for i := range nodes {
		n := &nodes[i]
		if why := n.fault(through); why != "" {
			failing[n.Name] = why
		} else if why := n.passed(s); why != "" {
			passed[n.Name] = why
		}
	}
	return failing, passed
}
