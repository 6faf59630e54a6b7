package fleet

import (
	"context"
	"errors"
	"fmt"
	"regexp"
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
		Name: "remote-command", Title: "Run a command that looks", Toolset: setInspect, Role: protocol.Viewer, Timeout: maxRun,
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
		return f.look(ctx, c, in.Target, in.limitInput, commands[0], commands[1:])
	})
	mcp.Add(s, mcp.Tool{
		Name: "systemctl", Title: "Look at units", Toolset: setInspect, Role: protocol.Viewer, Timeout: maxRun,
		Description: "Run systemctl on nodes, for what it tells: status, show, cat, list-units, list-unit-files, list-timers, list-sockets, list-jobs, list-machines, list-dependencies, " +
			"is-active, is-enabled, is-failed, is-system-running, get-default, show-environment. Without a command, it lists the units." + noShell,
	}, func(ctx context.Context, c *mcp.Call, in struct {
		targetInput
		limitInput
		Command string `json:"command,omitempty" jsonschema:"such as status or list-units"`
		Units   string `json:"units,omitempty" jsonschema:"names or globs of units, separated by commas"`
		Options string `json:"options,omitempty" jsonschema:"such as --failed --type=service"`
	}) (*mcp.Answer[runRow], error) {
		argv, err := systemctl(in.Command, in.Units, in.Options)
		if err != nil {
			return nil, err
		}
		return f.look(ctx, c, in.Target, in.limitInput, argv, nil)
	})
	mcp.Add(s, mcp.Tool{
		Name: "journalctl", Title: "Read journals", Toolset: setInspect, Role: protocol.Viewer, Timeout: maxRun,
		Description: fmt.Sprintf("Run journalctl on nodes. The newest %d entries are shown unless options say otherwise (-n, --since, --until). Narrow it by -u UNIT, -p err, -g PATTERN, -b, -k.", journalLines) + noShell,
	}, func(ctx context.Context, c *mcp.Call, in struct {
		targetInput
		limitInput
		Options string `json:"options,omitempty" jsonschema:"such as -u nginx -p err --since '1 hour ago'"`
		Matches string `json:"matches,omitempty" jsonschema:"such as _PID=1 or SYSLOG_IDENTIFIER=sshd"`
	}) (*mcp.Answer[runRow], error) {
		argv, err := journalctl(in.Options, in.Matches)
		if err != nil {
			return nil, err
		}
		return f.look(ctx, c, in.Target, in.limitInput, argv, nil)
	})
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

// systemctl makes the words of a command for systemctl.
func systemctl(command, units, options string) (argv []string, err error) {
	argv = []string{"systemctl"}
	for _, input := range []struct{ name, text string }{{"command", command}, {"options", options}} {
		words, err := split(input.text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", input.name, err)
		}
		argv = append(argv, words...)
		if input.name != "command" {
			continue
		}
		for _, unit := range strings.FieldsFunc(units, func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) }) {
			if strings.HasPrefix(unit, "-") {
				return nil, fmt.Errorf("units: %.80q is an option, and not a unit's name", unit)
			}
			argv = append(argv, unit)
		}
	}
	return argv, nil
}

// journalLines is how many entries are shown where nothing else is said.
const journalLines = 200

var saysHowMany = regexp.MustCompile(`^(-[a-zA-Z]*n.*|--lines(=.*)?|-S.*|--since(=.*)?|-U.*|--until(=.*)?|--list-boots|--disk-usage|--header|-N|--fields|-F.*|--field(=.*)?)$`)

// journalctl makes the words of a command for journalctl.
func journalctl(options, matches string) (argv []string, err error) {
	argv = []string{"journalctl"}
	for _, input := range []struct{ name, text string }{{"options", options}, {"matches", matches}} {
		words, err := split(input.text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", input.name, err)
		}
		if i := slices.IndexFunc(words, func(w string) bool { return strings.HasPrefix(w, "-") }); input.name == "matches" && i >= 0 {
			return nil, fmt.Errorf("matches: %.80q is an option; it belongs into options", words[i])
		}
		argv = append(argv, words...)
	}
	if !slices.ContainsFunc(argv[1:], saysHowMany.MatchString) {
		argv = append(argv, fmt.Sprintf("--lines=%d", journalLines))
	}
	return argv, nil
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
