package command

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/rule"
)

// etcdKeys are the commands that print what is below a key.
var etcdKeys = []struct{ name, key, what string }{
	{"nodes", "/cluster/nodes", "the nodes of the cluster"},
	{"services", "/cluster/services", "the services of the mesh"},
	{"backends", "/cluster/backends", "the backends of the mesh"},
	{"frontends", "/cluster/frontends", "the frontends of the mesh"},
	{"network", "/coreos.com", "the overlay network"},
}

type etcdOptions struct {
	asking
	targets []string
	via     string
	sshKey  string
}

func (a *app) etcdCommand() *cobra.Command {
	o := etcdOptions{asking: asking{concurrency: 1}}
	c := &cobra.Command{
		Use:                   "etcd [flags] WORD... --target NODE",
		DisableFlagsInUseLine: true,
		Short:                 "Ask the etcd of a cluster, by etcdctl on one of its control nodes",
		Long: `Ask the etcd of a cluster: etcdctl runs on a control node, with the node's own certificate, and what it prints is
printed. Its words may be one text. Which of them are allowed is up to the node's policy (docs/policy.md), as for
nix-infra exec; without changes in it, keys below /cluster and /coreos.com can be read, and written by an admin.

Of several targets the first one is asked; without any, the first of CTRL_NODES.`,
		Example: `  nix-infra etcd nodes --target etcd001
  nix-infra etcd "get --prefix /cluster/services" --target=etcd001
  nix-infra etcd ctl "del --prefix /cluster/services" --target=etcd001
  nix-infra etcd --target=etcd001 -- endpoint health --cluster`,
		RunE: func(c *cobra.Command, args []string) error { return a.etcdWords(c, args, &o) },
	}
	f := c.PersistentFlags()
	f.StringArrayVar(&o.targets, "target", nil, "the control `node` (default the first of CTRL_NODES)")
	f.DurationVar(&o.timeout, "wait", 30*time.Second, "how long the node may take to begin")
	f.StringVar(&o.prefix, "prefix", "auto", "name the node in front of each line: always, or never (auto is never)")
	f.StringVar(&o.via, "via", "", "agent, or ssh (default $NIX_INFRA_VIA, else agent)")
	f.StringVar(&o.sshKey, "ssh-key", "", "with --via=ssh: the key below ssh/ (default $SSH_KEY, else the project's)")
	c.AddCommand(&cobra.Command{
		Use: "ctl WORD...", Short: "Run etcdctl with these words",
		Example: `  nix-infra etcd ctl "get --prefix /cluster/nodes --keys-only" --target=etcd001`,
		RunE:    func(c *cobra.Command, args []string) error { return a.etcdWords(c, args, &o) },
	})
	for _, k := range etcdKeys {
		c.AddCommand(&cobra.Command{
			Use: k.name, Short: "Print " + k.what, Args: cobra.NoArgs,
			Example: fmt.Sprintf("  nix-infra etcd %s --target etcd001", k.name),
			RunE: func(c *cobra.Command, _ []string) error {
				return a.etcd(c.Context(), []string{"get", "--prefix", k.key}, &o)
			},
		})
	}
	return c
}

// etcdWords runs etcdctl with the words of a command line, which may be one text.
func (a *app) etcdWords(c *cobra.Command, args []string, o *etcdOptions) error {
	words := args
	if len(args) == 0 {
		return errors.New("ask etcd for what? Give one of " + strings.Join(etcdNames(), ", ") + ", or the words of an etcdctl command")
	}
	if len(args) == 1 || c.ArgsLenAtDash() < 0 {
		var err error
		if words, err = rule.Split(strings.TrimSpace(strings.Join(args, " "))); err != nil {
			return err
		}
	}
	return a.etcd(c.Context(), words, o)
}

func etcdNames() []string {
	var names []string
	for _, k := range etcdKeys {
		names = append(names, k.name)
	}
	return names
}

func (a *app) etcd(ctx context.Context, words []string, o *etcdOptions) error {
	me, err := a.identity()
	if err != nil {
		return err
	}
	via, err := viaOf(o.via, me)
	if err != nil {
		return err
	}
	order := protocol.CommandOrder{Argv: append([]string{"etcdctl"}, words...)}
	if err := order.Validate(); err != nil {
		return err
	}
	node, err := firstTarget(o.targets, me.project)
	if err != nil {
		return err
	}
	q, err := a.questionAs(ctx, me, []string{node}, o.asking)
	if err != nil {
		return err
	}
	defer q.session.Close()
	q.nodes, q.named = q.nodes[:1], o.prefix == "always"
	w := work{action: protocol.RunCommand, payload: func(string) any { return order }, instead: allowIt}
	if via == viaSSH {
		text := quoteWords(slices.Concat([]string{"env"}, etcdEnvironment(q.nodes[0].Name), order.Argv))
		_, err = q.runSSH(ctx, text, w, sshOptions{user: "root", sshKey: o.sshKey})
	} else {
		_, err = q.run(ctx, w)
	}
	return err
}

// firstTarget is the node that --target names first.
func firstTarget(targets []string, p *project.Project) (string, error) {
	isGap := func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) }
	named := strings.FieldsFunc(strings.Join(targets, " "), isGap)
	if named = append(named, p.ControlNodes()...); len(named) == 0 {
		return "", errors.New("ask which control node? Name it with --target, or in CTRL_NODES")
	}
	return named[0], nil
}

// etcdEnvironment is what etcdctl needs to know on a node, as the default rules give it.
func etcdEnvironment(node string) []string {
	var environ []string
	rules := rule.Default()
	if i := slices.IndexFunc(rules, func(r rule.Rule) bool { return r.Program == "etcdctl" }); i >= 0 {
		for _, v := range rules[i].Env {
			environ = append(environ, v.Name+"="+strings.ReplaceAll(v.Value, "{node}", node))
		}
	}
	return environ
}
