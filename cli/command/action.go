package command

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nkeys"
	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/rule"
)

// savedDocument says that an action's output is a secret now, in `action --save-as-secret --json`.
type savedDocument struct {
	Node   string `json:"node"`
	Secret string `json:"secret"`
	Saved  bool   `json:"saved"`
}

type actionOptions struct {
	asking
	targets []string
	module  string
	expect  string // digest of the script
	cmd     string
	envList []string // K=value,K=value
	env     []string // K=value, or K
	save    string
	rotate  bool
	force   bool
	limit   time.Duration
	merge   bool

	words []string // of the action
}

func (a *app) actionCommand() *cobra.Command {
	var o actionOptions
	c := &cobra.Command{
		Use:                   "action [flags] SELECTOR... --app-module M [-- WORD...]",
		DisableFlagsInUseLine: true,
		Short:                 "Run the action of an app module on nodes",
		Long: `Run the action.sh of an app module on nodes, as it was deployed to them: by root, with the words of --cmd, or those
behind --. A node whose action.sh is another one than the project's refuses.

Variables are for the script alone: their values are sealed to each node, and are in no argument and no log there.
They may have the placeholders of a node's own file ([%%localhost.ipv4%%], [%%db1.overlayIp%%]), and
[%%secrets/NAME%%] is the value of a secret of the project. --env-var NAME takes the value from the environment here.

With --save-as-secret, what the script on one node prints becomes a secret of the project, and is not shown: the node
seals it before it travels. Nothing is saved where the script fails or prints nothing.`,
		Example: `  nix-infra action db1 --app-module postgresql --cmd "create-db --database=shop"
  nix-infra action @db --app-module mongodb --cmd init --env-vars 'NODE_1=[%%db1.overlayIp%%],NODE_2=[%%db2.overlayIp%%]'
  nix-infra action db1 --app-module mariadb --env-var 'ROOT_PASSWORD=[%%secrets/mariadb.root%%]' -- status --verbose
  nix-infra action --target=db1 --app-module=mariadb --cmd="create-admin --username=app" --save-as-secret=app.connectionString`,
		RunE: func(c *cobra.Command, args []string) error {
			selectors, err := o.read(args, c.ArgsLenAtDash(), c.Flags().Changed("cmd"))
			if err != nil {
				return err
			}
			if err := o.lift(a); err != nil {
				return err
			}
			return a.action(c.Context(), selectors, &o)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&o.targets, "target", nil, targetUsage)
	f.StringVar(&o.module, "app-module", "", "folder below app_modules/")
	f.StringVar(&o.expect, "expect", "", "only if action.sh has this `SHA-256`, and else not at all")
	f.StringVar(&o.cmd, "cmd", "", "`words` for the script, taken apart as a shell does it, but nothing more")
	f.StringArrayVar(&o.envList, "env-vars", nil, "variables for the script, `K=value,K=value`; repeatable")
	f.StringArrayVar(&o.env, "env-var", nil, "one variable for the script, whose value may have commas: `K=value`, or K of the environment here; repeatable")
	f.StringVar(&o.save, "save-as-secret", "", "save what the script prints as the secret `NAME` of the project, without showing it")
	f.StringVar(&o.save, "store-as-secret", "", "")
	f.BoolVar(&o.rotate, "rotate", false, "with --save-as-secret: bring the new value to the nodes that use the secret, as secrets rotate does")
	_ = f.MarkHidden("store-as-secret") // another name of the same
	f.BoolVar(&o.force, "force", false, "replace a secret that is there without asking")
	f.DurationVar(&o.limit, "timeout", 0, "how long it may run; 0: as long as the node's policy lets it")
	f.DurationVar(&o.timeout, "wait", 30*time.Second, "how long a node may take to begin")
	f.BoolVar(&o.merge, "merge", false, "print to stdout what scripts write to stderr, too")
	o.manyFlags(f)
	return c
}

// read tells the selectors from the script's words.
func (o *actionOptions) read(args []string, dash int, cmd bool) (selectors []string, err error) {
	selectors = append(slices.Clone(o.targets), args...)
	switch {
	case dash >= 0 && cmd:
		return nil, errors.New("the action's words stand in --cmd or behind --, not in both")
	case dash >= 0:
		selectors = append(slices.Clone(o.targets), args[:dash]...)
		o.words = args[dash:]
	case !cmd:
		return nil, errors.New(`do what? Give the action's words: --cmd "status"`)
	case strings.TrimSpace(o.cmd) != "":
		if o.words, err = rule.Split(strings.TrimSpace(o.cmd)); err != nil {
			return nil, fmt.Errorf("--cmd: %w", err)
		}
	}
	if o.module == "" {
		return nil, errors.New("the action of which app module? Name it: --app-module mongodb")
	}
	return selectors, someNodes("run the action on which nodes?", "action")(nil, selectors)
}

// lift takes --save-as-secret out of --cmd's end, where the scripts around the earlier tool put it.
func (o *actionOptions) lift(a *app) error {
	if len(o.words) == 0 {
		return nil
	}
	last := o.words[len(o.words)-1]
	flag, name, ok := strings.Cut(last, "=")
	if !ok || flag != "--save-as-secret" && flag != "--store-as-secret" {
		return nil
	}
	if o.save != "" && o.save != name {
		return fmt.Errorf("the output shall be saved as %q and, at the end of the action's words, as %q: leave out one", o.save, name)
	}
	a.note("warning: %s stands among the words of the action; it is taken for an option of nix-infra, and belongs beside them", flag)
	o.save, o.words = name, o.words[:len(o.words)-1]
	return nil
}

func (a *app) action(ctx context.Context, selectors []string, o *actionOptions) error {
	limit, err := seconds("--timeout", o.limit)
	if err != nil {
		return err
	}
	if o.timeout <= 0 {
		return fmt.Errorf("--wait %v: use more than 0", o.timeout)
	}
	variables, err := readVariables(o.envList, o.env, a.Getenv)
	if err != nil {
		return err
	}
	if o.save != "" {
		if err := protocol.CheckSecretName(o.save); err != nil {
			return fmt.Errorf("--save-as-secret: %w", err)
		}
	} else if o.rotate {
		return errors.New("--rotate goes with --save-as-secret: it is about that secret")
	}
	me, err := a.identity()
	if err != nil {
		return err
	}
	script, err := me.project.Action(o.module)
	if err != nil {
		return err
	}
	digest := protocol.Digest(script)
	if o.expect != "" && digest != o.expect {
		return fmt.Errorf("the action.sh of %s is not what --expect says: its SHA-256 is %s", o.module, digest)
	}
	order := protocol.ScriptOrder{Module: o.module, SHA256: digest, Words: o.words, Timeout: limit}
	if err := order.Validate(); err != nil {
		return err
	}
	q, err := a.questionAs(ctx, me, selectors, o.asking)
	if err != nil {
		return err
	}
	defer q.session.Close()
	if o.save != "" {
		return q.actionAsSecret(ctx, o, order, variables)
	}
	payload, err := q.orders(ctx, order, variables)
	if err != nil {
		return err
	}
	_, err = q.run(ctx, work{action: protocol.RunScript, payload: payload, merge: o.merge})
	return err
}

// actionAsSecret runs the action on one node, and saves what it prints.
func (q *question) actionAsSecret(ctx context.Context, o *actionOptions, order protocol.ScriptOrder, variables []variable) error {
	if len(q.nodes) != 1 {
		return fmt.Errorf("a secret is what one node prints, and %s are selected", plural(len(q.nodes), "node"))
	}
	n, me := &q.nodes[0], q.session.me
	id, err := me.verifier.ProveNode(&n.NodeRecord, time.Now())
	if err != nil {
		return err
	}
	store := q.secretStore(me.project)
	if store.Has(o.save) && !o.force && !o.rotate {
		if err := q.confirm(fmt.Sprintf("there is a secret %s already; replace it?", o.save)); err != nil {
			return err
		}
	}
	if err := q.opensKeys(me.project); err != nil { // before something is made that can't be kept
		return err
	}
	once, err := nkeys.CreateCurveKeys()
	if err != nil {
		return err
	}
	defer once.Wipe()
	if order.SealTo, err = once.PublicKey(); err != nil {
		return err
	}
	payload, err := q.orders(ctx, order, variables)
	if err != nil {
		return err
	}
	r, err := q.run(ctx, work{action: protocol.RunScript, payload: payload, quiet: true})
	if err != nil {
		return withNote(err, "no secret was saved")
	}
	var value []byte // the node seals nothing where nothing was printed
	if sealed := r.runs[n.Name].sealed; len(sealed) > 0 {
		value, err = once.Open(sealed, id.XKey)
	}
	if err != nil {
		return &outcome{SomeFailed, fmt.Errorf("%s: what it printed was not sealed by that node, or was changed on its way; no secret was saved", n.Name)}
	}
	defer clear(value)
	text := strings.TrimRight(string(value), "\r\n")
	if text == "" {
		return &outcome{SomeFailed, fmt.Errorf("%s: the action printed nothing; no secret was saved", n.Name)}
	}
	if o.rotate && store.Has(o.save) {
		return q.rotateTo(ctx, me, store, o.save, []byte(text))
	}
	if err := store.Put(o.save, []byte(text)); err != nil {
		return &outcome{SomeFailed, err}
	}
	if q.json {
		q.document(savedDocument{n.Name, o.save, true})
	}
	q.say("%s: what the action of %s printed is secret %s now\n", n.Name, o.module, o.save)
	return nil
}

// opensKeys tells whether the project's keys can be opened, and so secrets stored.
func (a *app) opensKeys(p *project.Project) error {
	v := a.vault(p.Env.Get)
	names, err := v.Names()
	if err != nil || len(names) == 0 {
		return err
	}
	_, err = a.secret(v, names[0])
	return err
}

// withNote adds to what is said of a failure, and keeps its exit status.
func withNote(err error, note string) error {
	var o *outcome
	if errors.As(err, &o) {
		return &outcome{o.status, fmt.Errorf("%w; %s", o.err, note)}
	}
	return err
}
