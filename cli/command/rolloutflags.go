package command

import (
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// rolloutFlags are what commands that change nodes have in common: how the change reaches them, how long they have
// for it, and whether it is watched.
type rolloutFlags struct {
	// What the flags say, in words. What a command sets before register is what holds where neither a flag nor the
	// project says.
	project.Rollout
	own project.Rollout

	timeout, build, settle time.Duration
	detach, verbose        bool
	back                   bool // a way back: of the project's defaults it takes what GoingBack leaves
}

// register adds the flags to a command's. quiet is what --batch without a number sets.
func (r *rolloutFlags) register(f *pflag.FlagSet, quiet *bool) {
	r.own, r.Rollout = r.Rollout, project.Rollout{}
	words := func(value *string, name, own, usage string) {
		if own != "" {
			usage += " (default " + own + ")"
		}
		f.StringVar(value, name, "", usage)
	}
	words(&r.Canary, "canary", r.own.Canary, "first wave: `N|%` of the nodes; 0: no such wave")
	f.Var(batchFlag{&r.Batch, quiet}, "batch", "each further wave: `N|%` of the nodes; without a number: never ask anything")
	f.Lookup("batch").NoOptDefVal = batchAlone
	f.StringSliceVar(&r.Order, "order", nil, "nodes by tag, `@tag,@tag`: those with the first one come first, those with none of them last")
	words(&r.MaxUnavailable, "max-unavailable", r.own.MaxUnavailable, "at most `N|%` of the nodes are on their way at once; 0: any number")
	words(&r.MaxFailures, "max-failures", r.own.MaxFailures, "`N|%` of the nodes may fail; when one more did, no further node gets it")
	words(&r.OnFailure, "on-failure", r.own.OnFailure, "what happens then: `stop|pause|rollback` (those that have it go back; mode switch only)")
	words(&r.Soak, "soak", r.own.Soak, "after each wave, wait for this `duration`, such as 10m")
	words(&r.At, "at", r.own.At, "not before this `time`: 22:00 (the next, by the clock here), +2h, RFC 3339, or now")
	f.StringArrayVar(&r.Windows, "window", nil, "only within this `window`, such as \"mon-fri 22:00-04:00 Europe/Stockholm\"; repeatable; or always")
	f.DurationVar(&r.timeout, "timeout", 5*time.Minute, "from the start of activation to the proof; then the node rolls back")
	f.DurationVar(&r.build, "build-timeout", 2*time.Hour, "how long fetching and building may take")
	f.DurationVar(&r.settle, "settle", 5*time.Second, "for how long no unit may fail after activation")
	f.BoolVar(&r.detach, "detach", false, "don't watch")
	f.BoolVarP(&r.verbose, "verbose", "v", false, "print the build logs")
}

// order checks the flags and gives what all manifests of a plan have in common. Flags win over the project's settings.
func (r *rolloutFlags) order(settings project.Settings, mode protocol.Mode) (order, error) {
	if err := r.checkTimes(); err != nil {
		return order{}, err
	}
	o := order{mode: mode, timeout: r.timeout, build: r.build, settle: r.settle}
	if mode == protocol.DryActivate {
		if !reflect.DeepEqual(r.Rollout, project.Rollout{}) {
			return order{}, errors.New("a dry-activate changes nothing: it goes to all nodes at once, and takes no --canary, --batch and the like")
		}
		return o, nil
	}
	defaults := settings.Rollout
	if r.back {
		defaults = defaults.GoingBack()
	}
	if mode != protocol.Switch {
		if r.OnFailure == string(protocol.RollbackOnFailure) {
			return order{}, fmt.Errorf("--on-failure rollback goes with --mode switch, not with %s; use stop or pause", mode)
		}
		if defaults.OnFailure == string(protocol.RollbackOnFailure) {
			defaults.OnFailure = string(protocol.StopOnFailure)
		}
	}
	var err error
	o.strategy, err = r.Rollout.Over(defaults).Over(r.own).Strategy(time.Now())
	return o, err
}

func (r *rolloutFlags) checkTimes() error {
	for _, d := range []struct {
		flag     string
		value    time.Duration
		min, max time.Duration
	}{
		{"--timeout", r.timeout, time.Second, 24 * time.Hour},
		{"--build-timeout", r.build, time.Second, 7 * 24 * time.Hour},
		{"--settle", r.settle, 0, r.timeout - time.Second},
	} {
		if d.value < d.min || d.value > d.max || d.value%time.Second != 0 {
			return fmt.Errorf("%s %s: use whole seconds from %s to %s", d.flag, d.value, d.min, d.max)
		}
	}
	return nil
}

// batchFlag is --batch where there are waves. Everywhere else the flag means not to ask anything, and scripts say so
// to these commands, too: with a number it is the size of a wave, without one what it is elsewhere.
type batchFlag struct {
	size  *string
	quiet *bool
}

const batchAlone = "true"

func (b batchFlag) String() string { return "" }
func (b batchFlag) Type() string   { return "bool" } // help shows nothing of batchAlone then
func (b batchFlag) Set(text string) error {
	if text == batchAlone || text == "false" { // of --no-batch
		*b.quiet = text == batchAlone
		return nil
	}
	*b.size = text
	return protocol.Amount(text).Validate()
}

// joinBatch makes one word of --batch and a number behind it: a flag that may stand alone takes no second word.
func joinBatch(root *cobra.Command, args []string) []string {
	c, _, err := root.Find(args)
	if err != nil || c.Flags().Lookup("batch") == nil {
		return args
	}
	if _, waves := c.Flags().Lookup("batch").Value.(batchFlag); !waves {
		return args
	}
	var joined []string
	for i := 0; i < len(args); i++ {
		if args[i] == "--" {
			return append(joined, args[i:]...)
		}
		if args[i] == "--batch" && i+1 < len(args) && args[i+1] != "" && protocol.Amount(args[i+1]).Validate() == nil {
			i++
			joined = append(joined, "--batch="+args[i])
			continue
		}
		joined = append(joined, args[i])
	}
	return joined
}
