package fleet

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// comparedAtOnce is how many nodes are compared at the same time.
const comparedAtOnce = 8

// searchedBack is how many deployments are gone through for the one before.
const searchedBack = 50

func (f *Fleet) addDifferences(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "deployment-diff", Title: "What a deployment changes", Toolset: setDeploy, Role: protocol.Viewer, Timeout: 3 * maxRun,
		Description: "Which files of nodes a deployment changed, with the lines: against the deployment before it, on each of its nodes or those of target. " +
			"With deployment \"project\", what a deploy of the project as it is here would change now. What changes in the same way on many nodes is shown once.",
	}, func(ctx context.Context, c *mcp.Call, in struct {
		targetInput
		Deployment string `json:"deployment,omitempty" jsonschema:"the deployment, or the beginning of its id; last (the newest one) if nothing is said; or project" max:"200"`
	}) (*mcp.Answer[change], error) {
		if in.Deployment == "project" {
			words, err := selectors(in.Target)
			if err != nil {
				return nil, err
			}
			a, _, err := f.diffProject(ctx, c, words)
			return a, err
		}
		if in.Deployment == "" {
			in.Deployment = "last"
		}
		session, err := f.session(ctx, c)
		if err != nil {
			return nil, err
		}
		nodes, err := f.nodes(ctx, session, in.Target, "all")
		if err != nil {
			return nil, err
		}
		d, err := session.FindDeployment(ctx, in.Deployment, func(d *protocol.Deployment) bool { return d.Mode != protocol.DryActivate })
		if err != nil {
			return nil, err
		}
		return diffDeployment(ctx, session, d, namesOf(nodes))
	})
}

// diffDeployment compares a deployment, on those of the nodes that are its, with what each had before.
func diffDeployment(ctx context.Context, s *Session, d *protocol.Deployment, nodes []string) (*mcp.Answer[change], error) {
	record, err := s.Deployment(ctx, protocol.DeploymentQuery{ID: d.ID, Brief: true, Names: nodes})
	if err != nil {
		return nil, err
	}
	newest, err := s.Deployments(ctx, searchedBack)
	if err != nil {
		return nil, err
	}
	var (
		mu           sync.Mutex
		all          []change
		fresh, other []string
		same, past   int
	)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(comparedAtOnce)
	for _, node := range nodes {
		if _, ok := record.Nodes[node]; !ok {
			continue
		}
		g.Go(func() error {
			after, err := manifest(ctx, s, node, d.ID)
			if err != nil {
				return err
			}
			var before *deployed
			if after != nil {
				if before, err = predecessor(ctx, s, node, after, newest); err != nil {
					return err
				}
			}
			var changes []change
			if after != nil && before != nil {
				if changes, err = compare(ctx, s, node, before, after); err != nil {
					return err
				}
			}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case after == nil:
				past++
			case before == nil:
				fresh = append(fresh, node)
			case len(changes) == 0:
				same++
			default:
				other = append(other, node)
			}
			all = append(all, changes...)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	slices.Sort(fresh)
	a := differences(fold(all))
	sum := rowOfDeployment(d)
	a.Summary = sum.headline() + fmt.Sprintf("\nOther files than before on %d nodes, the same on %d.", len(other), same)
	if len(fresh) > 0 {
		a.Summary += fmt.Sprintf(" Nothing to compare with on %s: there is no earlier deployment with files.", some(fresh))
	}
	if past > 0 {
		a.Summary += fmt.Sprintf(" It brought no files to %d, or they are not kept any more.", past)
	}
	return a, nil
}

// predecessor is the deployment with files that a node was to have before another one, of the newest ones; nil: there is none.
func predecessor(ctx context.Context, s *Session, node string, of *deployed, newest []protocol.Deployment) (*deployed, error) {
	for i := range newest {
		if newest[i].Mode == protocol.DryActivate || newest[i].ID == of.Deployment {
			continue
		}
		m, err := manifest(ctx, s, node, newest[i].ID)
		if err != nil {
			return nil, err
		}
		if m != nil && m.Serial < of.Serial {
			return m, nil
		}
	}
	return nil, nil
}

func differences(changes []change) *mcp.Answer[change] {
	a := &mcp.Answer[change]{}
	for i := range changes {
		c := &changes[i]
		a.Parts = append(a.Parts, mcp.Part[change]{Head: fmt.Sprintf("%s %s on %s", mcp.Name(c.Path), c.Change, some(c.Nodes)), Text: c.Diff, Untrusted: true, Row: c})
		if c.Diff == "" {
			a.Parts[i].Text = c.Path + " " + c.Change
		}
	}
	return a
}

// diffProject is what nix-infra diff says of nodes, and the digest of what a deploy of the project would bring them.
func (f *Fleet) diffProject(ctx context.Context, c *mcp.Call, selectors []string) (a *mcp.Answer[change], digest string, err error) {
	out := f.Run(ctx, c.Caller.Creds, append([]string{"diff", "--"}, selectors...)...)
	var changes []change
	var unknown failures
	nodes := 0
	lines := bufio.NewScanner(bytes.NewReader(out.Stdout))
	lines.Buffer(nil, len(out.Stdout)+1)
	for lines.Scan() {
		var d struct {
			change
			Event, Node, Name, Unknown, Digest string
		}
		if err := json.Unmarshal(lines.Bytes(), &d); err != nil {
			return nil, "", fmt.Errorf("what nix-infra diff says: %w", err)
		}
		switch d.Event {
		case "node":
			if nodes++; d.Unknown != "" {
				unknown.add(d.Node, fmt.Errorf("%s", d.Unknown))
			}
		case "file":
			d.change.Diff = shorten(d.change.Diff, maxDiff)
			changes = append(changes, d.change)
		case "secret":
			changes = append(changes, change{Path: "secret " + d.Name, Change: d.Change, Nodes: d.Nodes})
		case "content":
			digest = d.Digest
		}
	}
	if nodes == 0 {
		return nil, "", out.err()
	}
	a = differences(changes)
	a.Summary = fmt.Sprintf("A deploy of the project as it is here to %s would change %s.", plural(nodes, "node"), plural(len(changes), "file"))
	if unknown.count() > 0 {
		a.Summary += " Of the nodes " + unknown.summary(nodes)
	}
	return a, digest, nil
}

// selectors are the words of a target, none of which is an option.
func selectors(target string) ([]string, error) {
	words := strings.FieldsFunc(target, func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) })
	if len(words) == 0 {
		return nil, fmt.Errorf("on which nodes? Name them in target, such as web1,web2, @web or all")
	}
	for _, w := range words {
		if strings.HasPrefix(w, "-") {
			return nil, fmt.Errorf("target: %.80q is an option, and no node", w)
		}
	}
	return words, nil
}

// err is what a command line ended with, in its own words.
func (o Outcome) err() error {
	text := strings.TrimSpace(strings.ReplaceAll(string(o.Stderr), "nix-infra: ", ""))
	if text == "" {
		text = fmt.Sprintf("it ended with status %d", o.Status)
	}
	return mcp.Said(errors.New(text))
}
