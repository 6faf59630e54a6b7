// Package fleet has the tools of the servers cluster and machine: what an assistant may ask of a fleet, and, where it was
// allowed, do to it. Each question is a signed request as the caller's credentials have it, and the nodes decide.
//
// Start here: Add gives a server all tools. ask.go asks nodes typed questions, run.go has them run commands by their
// policies; the other files are the tools, by what they are about.
package fleet

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// Host is what the tools need of the program around them.
type Host struct {
	Dir string // of the project

	// Connect connects to the fleet as the user of a credentials file.
	Connect func(ctx context.Context, creds string) (*Session, error)
	// Select chooses nodes by selectors.
	Select func(all []protocol.NodeState, selectors []string) ([]protocol.NodeState, error)
	// Run runs one command line of nix-infra as the user of a credentials file, with --json. Nothing in args may be an
	// option that a caller made up.
	Run func(ctx context.Context, creds string, args ...string) Outcome
	// Action is the action.sh of one of the project's app modules.
	Action func(module string) ([]byte, error)
	// ControlNodes are the project's.
	ControlNodes func() []string

	NoLookups bool // nothing is run that sends what is typed to other machines
}

// Session is a connection, and what proves what comes over it.
type Session struct {
	*client.Client
	Verifier *protocol.Verifier
	Key      string // the public key of the user
}

// Outcome is how a command line ended.
type Outcome struct {
	Status         int
	Stdout, Stderr []byte
}

// The sets of tools.
const (
	setFleet   = "fleet"   // which nodes there are, and how they are
	setInspect = "inspect" // what goes on on a node
	setDeploy  = "deploy"  // what was and would be deployed
	setFiles   = "files"   // the project
	setCluster = "cluster" // etcd
	setAct     = "act"     // what changes something
)

// Allowable is what --allow may name: the tools that change the fleet.
var Allowable = []string{"deploy", "rollback", "reboot", "action", "restart-unit"}

// Fleet is a fleet, as its tools see it.
type Fleet struct {
	Host

	mu    sync.Mutex
	slots map[string]*slot // by credentials file
}

// slot is the connection of one user. Whoever waits for it keeps no other user waiting.
type slot struct {
	mu      sync.Mutex
	session *Session // nil: there is none yet
}

// Add gives a server its tools, resources and prompts. With cluster, there is etcd.
func Add(s *mcp.Server, host Host, cluster bool) *Fleet {
	f := &Fleet{Host: host, slots: map[string]*slot{}}
	f.addNodes(s)
	f.addStats(s)
	f.addCommands(s)
	f.addUnits(s)
	f.addJournal(s)
	f.addDeployments(s)
	f.addDifferences(s)
	f.addFailures(s)
	f.addFiles(s)
	f.addActs(s)
	f.addResources(s)
	f.addPrompts(s)
	if cluster {
		f.addEtcd(s)
	}
	return f
}

// Close ends the connections.
func (f *Fleet) Close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, slot := range f.slots {
		slot.mu.Lock()
		if slot.session != nil {
			slot.session.Close()
		}
		slot.mu.Unlock()
	}
}

// session is the connection as the caller. It is made when it is first needed, and anew where it has ended for good, or its file has
// the credentials of somebody else meanwhile.
func (f *Fleet) session(ctx context.Context, c *mcp.Call) (*Session, error) {
	f.mu.Lock()
	own := f.slots[c.Caller.Creds]
	if own == nil {
		own = &slot{}
		f.slots[c.Caller.Creds] = own
	}
	f.mu.Unlock()
	own.mu.Lock()
	defer own.mu.Unlock()
	if own.session != nil && own.session.Key == c.Caller.Key && !own.session.Closed() {
		return own.session, nil
	}
	s, err := f.Connect(ctx, c.Caller.Creds)
	if err != nil {
		return nil, err
	}
	if s.Key != c.Caller.Key {
		s.Close()
		return nil, fmt.Errorf("%s has other credentials than it had; call again, or start the server anew", c.Caller.Creds)
	}
	if own.session != nil {
		own.session.Close()
	}
	own.session = s
	return s, nil
}

// targetInput is the input of tools that are about nodes.
type targetInput struct {
	Target string `json:"target,omitempty" jsonschema:"which nodes, separated by commas or spaces: names, globs (web*), @tag, key=value on facts (state=lost), all, and not in front of any of them"`
}

// nodes are those that an input names. Without one, they are all, where otherwise says so.
func (f *Fleet) nodes(ctx context.Context, s *Session, target, otherwise string) ([]protocol.NodeState, error) {
	if target = strings.TrimSpace(target); target == "" {
		target = otherwise
	}
	if target == "" {
		return nil, errors.New("on which nodes? Name them in target, such as web1,web2, @web or all; list-available-nodes tells which there are")
	}
	all, err := listNodes(ctx, s)
	if err != nil {
		return nil, err
	}
	chosen, err := f.Select(all, []string{target})
	if err != nil {
		return nil, err
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("no node is chosen by %.200q", target)
	}
	return chosen, nil
}

// listNodes are all nodes. Their names stand among our own words, so that each has to be one.
func listNodes(ctx context.Context, s *Session) ([]protocol.NodeState, error) {
	all, err := s.ListNodes(ctx)
	if err != nil {
		return nil, err
	}
	for i := range all {
		if err := protocol.CheckName(all[i].Name); err != nil {
			return nil, mcp.Said(fmt.Errorf("what the controller says of the nodes: %w", err))
		}
	}
	return all, nil
}

// node is the one that an input names.
func (f *Fleet) node(ctx context.Context, s *Session, name string) (*protocol.NodeState, error) {
	if err := protocol.CheckName(name); err != nil {
		return nil, fmt.Errorf("the node: %w", err)
	}
	return s.Node(ctx, name)
}

func namesOf(nodes []protocol.NodeState) []string {
	names := make([]string, len(nodes))
	for i := range nodes {
		names[i] = nodes[i].Name
	}
	return names
}

// shownNames is how many names stand in a sentence.
const shownNames = 12

// some lists names, as far as they fit into a sentence.
func some(names []string) string {
	if more := len(names) - shownNames; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:shownNames], ", "), more)
	}
	return strings.Join(names, ", ")
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
