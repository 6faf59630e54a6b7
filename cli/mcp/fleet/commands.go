package fleet

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/rule"
)

// noShell is what the descriptions of commands have in common.
const noShell = " Words are taken apart as a shell does it, and there is no shell: no ; && || & > < $( ) or variables, and options in full. " +
	"Each node holds it against its policy, as of a viewer, and refuses with the reason what no rule allows."

func (f *Fleet) addCommands(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "remote-command", Title: "Run a command that looks", Toolset: setInspect, Role: protocol.Viewer, OpenWorld: !f.NoLookups, Timeout: maxRun,
		Description: "Run a command that only looks on nodes, such as uname -a, ps aux, df -h, ss -tlnp, ip addr, dmesg or cat /etc/os-release." + noShell +
			" Behind a | there may be grep, head, tail, sort, uniq and wc -l.",
	}, func(ctx context.Context, c *mcp.Call, in struct {
		targetInput
		limitInput
		Command string `json:"command" jsonschema:"program and arguments, such as df -h /nix" max:"16384"`
	}) (*mcp.Answer[runRow], error) {
		commands, err := rule.SplitPipes(strings.TrimSpace(in.Command))
		if err != nil {
			return nil, err
		}
		if f.NoLookups && looksUp(commands[0]) {
			return nil, fmt.Errorf("%s sends what is typed to other machines, and this server was started so that nothing does (--no-lookups)", commands[0][0])
		}
		return f.look(ctx, c, in.Target, in.limitInput, commands[0], commands[1:])
	})
}

// looksUp tells of a command that a viewer may have run by default whether it sends to other machines what is typed behind it: there,
// in a name for instance, somebody may read what an assistant was talked into typing.
func looksUp(argv []string) bool {
	switch program := path.Base(argv[0]); program {
	case "ping", "traceroute", "tracepath", "dig", "nslookup", "host", "resolvectl", "arp":
		return true
	case "getent":
		return len(argv) > 1 && !slices.Contains([]string{"passwd", "group", "services", "protocols"}, argv[1])
	case "lsof": // -i @HOST
		return slices.ContainsFunc(argv, func(a string) bool { return strings.Contains(a, "@") })
	}
	return false
}

// look has nodes run a command for a viewer.
func (f *Fleet) look(ctx context.Context, c *mcp.Call, target string, limit limitInput, argv []string, pipe [][]string) (*mcp.Answer[runRow], error) {
	seconds, err := limit.seconds()
	if err != nil {
		return nil, err
	}
	behind, err := filters(pipe)
	if err != nil {
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
	all, err := f.run(ctx, s, namesOf(nodes), argv, seconds, protocol.Viewer)
	if err != nil {
		return nil, err
	}
	for _, r := range all {
		if r.err == nil {
			r.stdout = through(behind, r.stdout)
		}
	}
	return show(all, argv[0]), nil
}

// split makes the words of a text that stands behind a program's name, and may be empty.
func split(text string) ([]string, error) {
	const program = "x "
	words, err := rule.Split(program + strings.TrimSpace(text))
	var syntax *rule.ShellSyntax
	if errors.As(err, &syntax) {
		syntax.At -= len(program)
	}
	if err != nil {
		return nil, err
	}
	return words[1:], nil
}

// controlNode is the node whose etcd is asked where none is named, as the earlier tool had it.
const controlNode = "etcd001"

func (f *Fleet) addEtcd(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "etcd", Title: "Look into etcd", Toolset: setCluster, Role: protocol.Viewer, Timeout: maxRun,
		Description: "Ask the etcd of the cluster, by etcdctl on one control node: get (keys below /cluster and /coreos.com), watch, member list, endpoint health, endpoint status, alarm list, " +
			"user list, role list, version. Nothing is written." + noShell,
	}, func(ctx context.Context, c *mcp.Call, in struct {
		Target string `json:"target,omitempty" jsonschema:"a control node; of several the first one is asked, and without any the first of the project's"`
		limitInput
		Query string `json:"query" jsonschema:"words of etcdctl, such as get --prefix /cluster/nodes"`
	}) (*mcp.Answer[runRow], error) {
		words, err := split(in.Query)
		if err != nil {
			return nil, fmt.Errorf("query: %w", err)
		}
		if len(words) == 0 {
			return nil, errors.New("query: what is to be asked? Such as get --prefix /cluster/nodes")
		}
		node := controlNode
		if control := f.ControlNodes(); len(control) > 0 {
			node = control[0]
		}
		if named := strings.FieldsFunc(in.Target, func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) }); len(named) > 0 {
			node = named[0]
		}
		if err := protocol.CheckName(node); err != nil {
			return nil, fmt.Errorf("target: %w", err)
		}
		return f.look(ctx, c, node, in.limitInput, append([]string{"etcdctl"}, words...), nil)
	})
}
