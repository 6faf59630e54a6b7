package command

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/protocol"
)

// What the units of a node have where nothing is said.
const (
	rotateTimeout = time.Minute
	rotateSettle  = 5 * time.Second
)

type rotateOptions struct {
	value             valueFlags
	due, resume, undo bool
	waves             project.Rollout // Canary, Batch, Order and MaxFailures
	timeout, settle   time.Duration
}

func (a *app) secretsRotateCommand() *cobra.Command {
	var o rotateOptions
	c := &cobra.Command{
		Use:   "rotate NAME",
		Short: "Give a secret another value, on the nodes that use it too",
		Long: `Give a secret another value, from a pipe, a file or a generator (or an action: nix-infra action --save-as-secret NAME
--rotate), and bring it to the nodes whose files name it: without
a deploy, each encrypts it and restarts the units that load it, and no others. A node where these don't hold
takes the old value back by itself.

One node comes first (--canary), the others after it, by the --order of tags and --batch at a time. When more than
--max-failures nodes failed, those that have the new value get the old one back. The project has the new value once the
nodes have it. Nodes that are offline get it by their next deploy; the exit status is 3 then.

An interrupted rotation is not lost: --resume goes on with the new value, --undo brings the old one back.

--due rotates all that are older than nix-infra.yaml lets them become and can be made up (secrets.NAME.generate).`,
		Example: `  nix-infra secrets rotate session.key --generate 32
  pass show shop/db | nix-infra secrets rotate db.password --order @db,@web --batch 25%
  nix-infra secrets rotate db.password --undo
  nix-infra secrets rotate --due --batch`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.secretsRotate(c, strings.Join(args, ""), &o)
		},
	}
	f := c.Flags()
	o.value.register(f)
	f.BoolVar(&o.due, "due", false, "rotate all that are due, with values that are made up")
	f.BoolVar(&o.resume, "resume", false, "go on with a rotation that was interrupted")
	f.BoolVar(&o.undo, "undo", false, "take back a rotation that was interrupted")
	f.StringVar(&o.waves.Canary, "canary", "", "first wave: `N|%` of the nodes; 0: no such wave (default: the project's, else 1)")
	f.Var(batchFlag{&o.waves.Batch, &a.batch}, "batch", "each further wave: `N|%` of the nodes; without a number: never ask anything")
	f.Lookup("batch").NoOptDefVal = batchAlone
	f.StringSliceVar(&o.waves.Order, "order", nil, "nodes by tag, `@tag,@tag`: those with the first one come first, those with none of them last")
	f.StringVar(&o.waves.MaxFailures, "max-failures", "", "`N|%` of the nodes may fail, and keep the old value (default 0)")
	f.DurationVar(&o.timeout, "timeout", rotateTimeout, "how long the units of a node have to be right again")
	f.DurationVar(&o.settle, "settle", rotateSettle, "for how long they have to stay so")
	return c
}

func (o *rotateOptions) check(name string) error {
	ways := 0
	for _, way := range []bool{o.due, o.resume, o.undo} {
		if way {
			ways++
		}
	}
	switch {
	case ways > 1:
		return errors.New("--due, --resume and --undo are different things; use one of them")
	case o.due && name != "":
		return errors.New("--due rotates all that are due; leave out the name, or --due")
	case !o.due && name == "":
		return errors.New("rotate which secret? Name it, or say --due")
	case !o.due:
		if err := protocol.CheckSecretName(name); err != nil {
			return err
		}
	}
	order := protocol.RotateOrder{Secret: protocol.SealedSecret{Name: "any", Sealed: make([]byte, 64)}, Timeout: int(o.timeout / time.Second), Settle: int(o.settle / time.Second)}
	if err := order.Validate(); err != nil || o.timeout%time.Second != 0 || o.settle%time.Second != 0 {
		return fmt.Errorf("--timeout %s with --settle %s: use whole seconds up to an hour, and less to settle than that", o.timeout, o.settle)
	}
	return nil
}

func (a *app) secretsRotate(c *cobra.Command, name string, o *rotateOptions) error {
	if err := o.check(name); err != nil {
		return err
	}
	me, err := a.identity()
	if err != nil {
		return err
	}
	store := a.secretStore(me.project)
	if o.due {
		return a.rotateDue(c.Context(), me, store, o)
	}
	old, err := a.existing(store, name)
	if err != nil {
		return err
	}
	var value []byte
	switch pending := store.HasPending(name); {
	case pending && !o.resume && !o.undo:
		return errUnfinished(name)
	case !pending && (o.resume || o.undo):
		return fmt.Errorf("no rotation of %s was interrupted", name)
	case pending:
		value, err = store.Pending(name)
	default:
		value, err = o.value.read(a, c)
	}
	if err != nil {
		return err
	}
	return a.rotate(c.Context(), me, store, o, name, old, value)
}

// rotateDue rotates what is due and can be made up, and ends with an error about what can't.
func (a *app) rotateDue(ctx context.Context, me *identity, store *vault.Secrets, o *rotateOptions) error {
	names, err := store.Names()
	if err != nil {
		return err
	}
	var failed []error
	ended := OK
	due := 0
	for _, name := range names {
		age := me.project.Settings.SecretMaxAge(name)
		if age == 0 || time.Since(store.Changed(name)) < age {
			continue
		}
		due++
		n := me.project.Settings.Secrets[name].Generate
		switch {
		case n == 0:
			failed = append(failed, fmt.Errorf("%s is due, and can't be made up: rotate it by hand, or set secrets.%s.generate in %s", name, name, project.SettingsFile))
			ended = SomeFailed
			continue
		case store.HasPending(name):
			failed = append(failed, fmt.Errorf("%s: a rotation was interrupted; end it by --resume or --undo", name))
			ended = SomeFailed
			continue
		}
		old, err := store.Get(name)
		if err != nil {
			return err
		}
		value, err := generate(n)
		if err != nil {
			return err
		}
		if err := a.rotate(ctx, me, store, o, name, old, value); err != nil {
			if s := status(ctx, err); s == Interrupted || s == Refused {
				return err
			} else if ended == OK || s == SomeFailed {
				ended = s
			}
			failed = append(failed, fmt.Errorf("%s: %w", name, err))
		}
	}
	switch {
	case due == 0:
		a.say("no secret is due\n")
		return nil
	case len(failed) == 0:
		return nil
	case len(failed) == 1:
		return &outcome{ended, failed[0]}
	}
	return &outcome{ended, &errorList{"not everything that is due was rotated everywhere:", failed}}
}

// rotateTo is secrets rotate without flags.
func (a *app) rotateTo(ctx context.Context, me *identity, store *vault.Secrets, name string, value []byte) error {
	if store.HasPending(name) {
		return errUnfinished(name)
	}
	old, err := store.Get(name)
	if err != nil {
		return err
	}
	return a.rotate(ctx, me, store, &rotateOptions{timeout: rotateTimeout, settle: rotateSettle}, name, old, value)
}

func errUnfinished(name string) error {
	return fmt.Errorf("a rotation of %s was interrupted: --resume goes on with its new value, --undo brings the old one back (nix-infra secrets rotate %s)", name, name)
}

// rotate brings a value to the nodes that use a secret, and then into the project. The error has the status to exit with.
func (a *app) rotate(ctx context.Context, me *identity, store *vault.Secrets, o *rotateOptions, name string, old, value []byte) error {
	s, err := a.connectAs(ctx, me)
	if err != nil {
		return err
	}
	defer s.Close()
	r, err := a.newRotation(ctx, s, store, o, name, old, value)
	if err != nil {
		return err
	}
	switch {
	case r.users == 0 && o.undo:
		return store.DropPending(name)
	case r.users == 0:
		if err := store.Put(name, value); err != nil {
			return err
		}
		r.end("stored")
		a.say("stored secret %s; no node's file names it\n", name)
		return nil
	case len(r.nodes) == 0:
		return &outcome{Unanswered, fmt.Errorf("no node that uses %s is online, and nothing was changed; secrets store keeps a value for the next deploy: %s", name, some(r.offline))}
	case o.undo:
		return r.undo(ctx)
	}
	if !o.resume {
		if err := store.PutPending(name, value); err != nil {
			return err
		}
	}
	return r.run(ctx)
}
