package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/rule"
)

// actTime is how long a tool may take that changes something: an action may, and a deploy composes and uploads.
const actTime = 10 * time.Minute

// document is one that the command line prints with --json (docs/json.md).
type document = map[string]any

// addActs gives a server the tools that change the fleet. Each has a person confirm first, and needs credentials that
// permit it.
func (f *Fleet) addActs(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "deploy", Title: "Deploy the project", Toolset: setAct, Role: protocol.LeastRole(protocol.Deploy), Effect: mcp.Destroys, Allow: "deploy", Timeout: actTime,
		Description: "Deploy the project as it is here to nodes. A person is shown what would change and has to confirm it. It goes on when this returns: deployment tells how far it is. " +
			"Each node proves the new system or goes back by itself. With canary, batch and max_failures it goes out in waves.",
	}, func(ctx context.Context, c *mcp.Call, in struct {
		Target      string `json:"target" jsonschema:"which nodes: names, globs, @tag, separated by commas, or all"`
		Mode        string `json:"mode,omitempty" enum:"switch,boot,test" jsonschema:"switch if nothing is said"`
		Canary      string `json:"canary,omitempty" jsonschema:"first wave: a number or share (10%) of the nodes" max:"10"`
		Batch       string `json:"batch,omitempty" jsonschema:"each further wave: a number or share of the nodes" max:"10"`
		MaxFailures string `json:"max_failures,omitempty" jsonschema:"so many may fail before no further node gets it" max:"10"`
		OnFailure   string `json:"on_failure,omitempty" enum:"stop,pause,rollback"`
	}) (*mcp.Answer[document], error) {
		nodes, err := f.affected(ctx, c, in.Target)
		if err != nil {
			return nil, err
		}
		changes, digest, err := f.diffProject(ctx, c, nodes.names)
		if err != nil {
			return nil, err
		}
		if digest == "" {
			return nil, errors.New("what this would change is too long to be looked at in whole; deploy to fewer nodes at a time")
		}
		args, extra := []string{"deploy", "--detach", "--expect=" + digest}, ""
		for _, flag := range []struct{ name, value string }{{"mode", in.Mode}, {"canary", in.Canary}, {"batch", in.Batch}, {"max-failures", in.MaxFailures}, {"on-failure", in.OnFailure}} {
			if flag.value != "" {
				args = append(args, "--"+flag.name+"="+flag.value)
				extra += fmt.Sprintf(", %s %s", flag.name, flag.value)
			}
		}
		question := fmt.Sprintf("Deploy the project in %s to %s%s?\n%s", f.Dir, nodes, extra, changes.Summary)
		var paths []string
		for _, p := range changes.Parts {
			paths = append(paths, mcp.Name(p.Row.Path))
		}
		if len(paths) > 0 {
			question += "\nThat changes: " + some(paths)
		}
		return f.act(ctx, c, question, slices.Concat(args, []string{"--"}, nodes.names))
	})
	mcp.Add(s, mcp.Tool{
		Name: "rollback", Title: "Roll nodes back", Toolset: setAct, Role: protocol.LeastRole(protocol.Deploy), Effect: mcp.Destroys, Allow: "rollback", Timeout: actTime,
		Description: "Have nodes go back to the system that was proven before the one that runs, or to a generation of theirs (generations lists them). A person has to confirm it. It goes on when this returns: deployment tells how far it is.",
	}, func(ctx context.Context, c *mcp.Call, in struct {
		Target string `json:"target" jsonschema:"which nodes: names, globs, @tag, separated by commas, or all"`
		To     int    `json:"to,omitempty" jsonschema:"number of a generation; what was proven before if nothing is said"`
	}) (*mcp.Answer[document], error) {
		nodes, err := f.affected(ctx, c, in.Target)
		if err != nil {
			return nil, err
		}
		args, to := []string{"rollback", "--detach"}, "what was proven before"
		if in.To != 0 {
			args, to = append(args, "--to="+strconv.Itoa(in.To)), fmt.Sprintf("generation %d", in.To)
		}
		return f.act(ctx, c, fmt.Sprintf("Roll back to %s on %s?", to, nodes), slices.Concat(args, nodes.expected(), []string{"--"}, nodes.names), nodes.running)
	})
	mcp.Add(s, mcp.Tool{
		Name: "reboot", Title: "Reboot nodes", Toolset: setAct, Role: protocol.LeastRole(protocol.Deploy), Effect: mcp.Destroys, Allow: "reboot", Timeout: actTime,
		Description: "Reboot nodes, one after the other; each has to prove its system afterwards. A person has to confirm it. It goes on when this returns: deployment tells how far it is.",
	}, func(ctx context.Context, c *mcp.Call, in struct {
		Target string `json:"target" jsonschema:"which nodes: names, globs, @tag, separated by commas, or all"`
	}) (*mcp.Answer[document], error) {
		nodes, err := f.affected(ctx, c, in.Target)
		if err != nil {
			return nil, err
		}
		return f.act(ctx, c, fmt.Sprintf("Reboot %s, one after the other?", nodes), slices.Concat([]string{"reboot", "--detach"}, nodes.expected(), []string{"--"}, nodes.names), nodes.running)
	})
	mcp.Add(s, mcp.Tool{
		Name: "action", Title: "Run an app module's action", Toolset: setAct, Role: protocol.LeastRole(protocol.RunScript), Effect: mcp.Destroys, Allow: "action", Timeout: actTime,
		Description: "Run the action.sh of an app module on nodes, as it was deployed to them, as root. A person has to confirm it.",
	}, func(ctx context.Context, c *mcp.Call, in struct {
		Target string `json:"target" jsonschema:"which nodes: names, globs, @tag, separated by commas, or all"`
		Module string `json:"module" jsonschema:"folder below app_modules/" max:"128"`
		Words  string `json:"words" jsonschema:"words for the script, such as status" max:"4096"`
	}) (*mcp.Answer[document], error) {
		words, err := rule.Split(strings.TrimSpace(in.Words))
		if err != nil {
			return nil, fmt.Errorf("words: %w", err)
		}
		script, err := f.Action(in.Module)
		if err != nil {
			return nil, err
		}
		nodes, err := f.affected(ctx, c, in.Target)
		if err != nil {
			return nil, err
		}
		digest := protocol.Digest(script)
		args := []string{"action", "--app-module=" + in.Module, "--expect=" + digest, "--timeout=5m"}
		for _, name := range nodes.names {
			args = append(args, "--target="+name)
		}
		question := fmt.Sprintf("Run the action %q of app module %q on %s, as root? Its action.sh has %s, and the SHA-256 %s.", words, in.Module, nodes, plural(bytes.Count(script, []byte("\n")), "line"), digest)
		return f.act(ctx, c, question, slices.Concat(args, []string{"--"}, words))
	})
	mcp.Add(s, mcp.Tool{
		Name: "restart-unit", Title: "Restart units", Toolset: setAct, Role: protocol.Operator, Effect: mcp.Destroys, Allow: "restart-unit", Timeout: actTime,
		Description: "Restart units on nodes, as each node's policy lets an operator: services, timers, sockets and paths, and none of the system's own. A person has to confirm it.",
	}, func(ctx context.Context, c *mcp.Call, in struct {
		Target string `json:"target" jsonschema:"which nodes: names, globs, @tag, separated by commas, or all"`
		Units  string `json:"units" jsonschema:"names of units, separated by commas"`
	}) (*mcp.Answer[runRow], error) {
		argv, err := systemctl("restart", in.Units, "")
		if err != nil {
			return nil, err
		}
		if len(argv) == 2 {
			return nil, fmt.Errorf("units: which ones?")
		}
		nodes, err := f.affected(ctx, c, in.Target)
		if err != nil {
			return nil, err
		}
		if err := c.Confirm(ctx, fmt.Sprintf("Restart %s on %s?", strings.Join(argv[2:], ", "), nodes)+as(c), nodes.names...); err != nil {
			return nil, err
		}
		all, err := f.run(ctx, nodes.session, nodes.names, argv, maxLimit, protocol.Operator)
		if err != nil {
			return nil, err
		}
		return show(all, "systemctl restart"), nil
	})
}

// affected are the nodes that something is about. What is done is for these names, whatever the target chooses a moment later.
type affected struct {
	session  *Session
	names    []string
	closures []string // that they run
	running  string   // what each runs and by which deployment, for what depends on it
}

func (f *Fleet) affected(ctx context.Context, c *mcp.Call, target string) (*affected, error) {
	if _, err := selectors(target); err != nil {
		return nil, err
	}
	s, err := f.session(ctx, c)
	if err != nil {
		return nil, err
	}
	nodes, err := f.nodes(ctx, s, target, "")
	if err != nil {
		return nil, err
	}
	a := &affected{session: s, names: namesOf(nodes)}
	for i := range nodes {
		closure := "unknown" // which is no store path, so that the node is refused
		if b := nodes[i].Beat; b != nil {
			if protocol.IsStorePath(b.Closure) {
				closure = b.Closure
			}
			a.running += fmt.Sprintf("%s %d %s\n", b.Closure, b.Generation, b.Deployment)
		}
		a.closures = append(a.closures, closure)
	}
	return a, nil
}

func (a *affected) String() string {
	return fmt.Sprintf("%s (%s)", plural(len(a.names), "node"), some(a.names))
}

// expected has a command line refuse nodes that run something else by then.
func (a *affected) expected() []string {
	return []string{"--expect=" + strings.Join(a.closures, ",")}
}

// as says as whom something is done.
func as(c *mcp.Call) string {
	return fmt.Sprintf("\nIt is done as %s (%s).", c.Caller.Name, c.Caller.Role)
}

// act runs a command line once a person has confirmed what it does. The confirmation is bound to the whole of it, in which there
// are all nodes and the digests of what is brought to them, and to what else it depends on.
func (f *Fleet) act(ctx context.Context, c *mcp.Call, question string, args []string, on ...string) (*mcp.Answer[document], error) {
	if err := c.Confirm(ctx, question+as(c), slices.Concat(args, on)...); err != nil {
		return nil, err
	}
	out := f.Run(ctx, c.Caller.Creds, args...)
	a := &mcp.Answer[document]{Failed: out.Status != 0}
	for line := range bytes.Lines(out.Stdout) {
		var d document
		if json.Unmarshal(line, &d) == nil {
			a.Parts = append(a.Parts, mcp.Part[document]{Text: string(line), Untrusted: true, Row: &d})
		}
	}
	if out.Status == 0 && len(out.Stderr) == 0 {
		a.Summary = "Done: nix-infra " + args[0] + "."
		return a, nil
	}
	a.Summary = fmt.Sprintf("nix-infra %s ended with status %d.", args[0], out.Status)
	a.Parts = append(a.Parts, mcp.Part[document]{Head: "stderr", Text: out.err().Error(), Untrusted: true, Row: &document{"stderr": out.err().Error()}})
	return a, nil
}
