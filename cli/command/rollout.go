package command

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

func (a *app) rolloutCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "rollout",
		Short: "Watch and steer how deployments reach their nodes",
		Long: `Watch and steer how deployments reach their nodes. Every deployment is a rollout, under the same ID; a
dry-activate is none. ID may be the beginning of one, or last for the newest.`,
		Example: `  nix-infra rollout list
  nix-infra rollout watch
  nix-infra rollout pause last`,
		Args: unknownSubcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.rolloutListCommand(), a.rolloutShowCommand(), a.rolloutWatchCommand(), a.rolloutSteerCommand(protocol.PauseRollout),
		a.rolloutSteerCommand(protocol.ResumeRollout), a.rolloutSteerCommand(protocol.AbortRollout), a.rolloutRollbackCommand())
	return c
}

// isRollout tells whether a deployment is let out in steps that can be watched and steered.
func isRollout(d *protocol.Deployment) bool { return d.Mode != protocol.DryActivate }

// findRollout is the summary of a rollout.
func findRollout(ctx context.Context, s *session, id string) (*protocol.Deployment, error) {
	d, err := s.FindDeployment(ctx, id, isRollout)
	if err == nil && !isRollout(d) {
		err = fmt.Errorf("deployment %s is a dry-activate, which is no rollout; nix-infra deployment show %s", d.ID, d.ID)
	}
	return d, err
}

// withRollout connects, finds a rollout, and does something with its summary.
func (a *app) withRollout(ctx context.Context, id string, do func(*session, *protocol.Deployment) error) error {
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	d, err := findRollout(ctx, s, id)
	if err != nil {
		return err
	}
	return do(s, d)
}

func (a *app) rolloutListCommand() *cobra.Command {
	var limit int
	var open bool
	c := &cobra.Command{
		Use:   "list",
		Short: "List rollouts, the newest first",
		Example: `  nix-infra rollout list
  nix-infra rollout list --open
  nix-infra rollout list --json | jq -r 'select(.state == "paused") | .deployment'`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if limit < 0 {
				return fmt.Errorf("--limit %d: use 0 (all) or more", limit)
			}
			s, err := a.connect(c.Context())
			if err != nil {
				return err
			}
			defer s.Close()
			all, err := s.Deployments(c.Context(), 0)
			if err != nil {
				return err
			}
			all = slices.DeleteFunc(all, func(d protocol.Deployment) bool { return !isRollout(&d) || open && d.Rollout.State.Ended() })
			if limit > 0 {
				all = all[:min(limit, len(all))]
			}
			a.listRollouts(all)
			return nil
		},
	}
	c.Flags().IntVar(&limit, "limit", 20, "how many, 0 for all")
	c.Flags().BoolVar(&open, "open", false, "only those that have not ended")
	return c
}

func (a *app) listRollouts(all []protocol.Deployment) {
	var rows [][]ui.Cell
	for i := range all {
		d := documentOfDeployment(&all[i])
		if a.json {
			a.document(d)
			continue
		}
		wave := fmt.Sprintf("%d/%d", d.Wave, len(d.Waves))
		row := ui.Text(d.Deployment, string(d.State), wave, counts(d.Count), d.By, d.Created.Local().Format(time.DateTime), d.Reason)
		row[1].Colour = rolloutColour(d.State)
		rows = append(rows, row)
	}
	if !a.json {
		a.out.Table([]string{"ROLLOUT", "STATE", "WAVE", "NODES", "BY", "CREATED", "REASON"}, rows)
	}
}

func rolloutColour(s protocol.RolloutState) ui.Colour {
	switch s {
	case protocol.RolloutDone:
		return ui.Green
	case protocol.RolloutStopped, protocol.RolloutAborted, protocol.RolloutRolledBack:
		return ui.Red
	case protocol.RolloutPaused, protocol.RolloutScheduled, protocol.RolloutTrailing:
		return ui.Yellow
	}
	return ui.Cyan
}

func (a *app) rolloutShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show ID",
		Short: "Show where a rollout stands: its waves, and each node",
		Example: `  nix-infra rollout show last
  nix-infra rollout show 20260102-1504`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withRollout(c.Context(), args[0], func(s *session, d *protocol.Deployment) error {
				d, err := s.Deployment(c.Context(), protocol.DeploymentQuery{ID: d.ID, Brief: true})
				if err != nil {
					return err
				}
				if a.json {
					a.printDeployment(d)
					return nil
				}
				a.showRollout(d)
				return nil
			})
		},
	}
}

func (a *app) showRollout(d *protocol.Deployment) {
	row := func(name, value string) {
		if value != "" {
			a.say("%s %s\n", a.out.Paint(ui.Bold, fmt.Sprintf("%-12s", name)), ui.Clean(value))
		}
	}
	r := &d.Rollout
	row("rollout", fmt.Sprintf("%s, %s by %s at %s", d.ID, d.Mode, d.By, d.Created.Local().Format(time.DateTime)))
	row("state", stateText(r, time.Now())+", since "+r.Since.Local().Format(time.DateTime))
	row("steered by", r.By)
	row("strategy", strategyText(&d.Strategy))
	row("nodes", counts(documentOfDeployment(d).Count))
	row("failures", fmt.Sprintf("%d, %d may", r.Failures, r.MaxFailures))
	row("takes back", d.Undoes)
	row("taken back", r.Back)
	var results []resultDocument
	for n := range d.Nodes {
		results = append(results, resultIn(d, n))
	}
	slices.SortFunc(results, func(x, y resultDocument) int {
		return cmp.Or(cmp.Compare(x.Wave, y.Wave), strings.Compare(x.Node, y.Node))
	})
	a.say("\n")
	a.showWaves(r, results)
	var rows [][]ui.Cell
	for _, n := range results {
		row := ui.Text(number(uint64(n.Wave)), n.Node, n.Outcome, took(n.Seconds), n.Reason)
		if row[2].Colour = stateColour(n.Outcome); n.Failed {
			row[2].Colour = ui.Red
		}
		rows = append(rows, row)
	}
	a.out.Table([]string{"WAVE", "NODE", "OUTCOME", "TOOK", "NOTE"}, rows)
}

// shownWaves is how many waves are told of before and after the one that is released.
const shownWaves = 10

// showWaves says of each wave how its nodes are, where there is more than one.
func (a *app) showWaves(r *protocol.RolloutStatus, results []resultDocument) {
	if len(r.Waves) < 2 {
		return
	}
	of := make([]map[string]int, len(r.Waves)+1)
	for _, n := range results {
		if n.Wave >= len(of) {
			continue
		}
		if of[n.Wave] == nil {
			of[n.Wave] = map[string]int{}
		}
		of[n.Wave][n.Outcome]++
	}
	for wave := max(1, r.Wave-shownWaves); wave <= min(len(r.Waves), r.Wave+shownWaves); wave++ {
		name := fmt.Sprintf("wave %d", wave)
		if wave == r.Wave {
			name = a.out.Paint(ui.Bold, name)
		}
		a.say("%s of %s: %s\n", name, nodes(r.Waves[wave-1]), ui.Clean(counts(of[wave])))
	}
	a.say("\n")
}

// strategyText is a strategy in words.
func strategyText(s *protocol.Strategy) string {
	var parts []string
	amount := func(a protocol.Amount) bool { return a.Ceil(1_000_000) > 0 }
	many := func(a protocol.Amount) string {
		switch {
		case a == "1":
			return "1 node"
		case strings.HasSuffix(string(a), "%"):
			return string(a) + " of the nodes"
		}
		return string(a) + " nodes"
	}
	if amount(s.Canary) {
		parts = append(parts, many(s.Canary)+" first")
	}
	switch {
	case amount(s.Batch):
		parts = append(parts, many(s.Batch)+" at a time")
	case amount(s.Canary):
		parts = append(parts, "then all others")
	default:
		parts = append(parts, "all at once")
	}
	if len(s.Order) > 0 {
		parts = append(parts, "in the order @"+strings.Join(s.Order, " @"))
	}
	if s.Soak > 0 {
		parts = append(parts, (time.Duration(s.Soak)*time.Second).String()+" between waves")
	}
	if amount(s.MaxUnavailable) {
		parts = append(parts, "at most "+many(s.MaxUnavailable)+" on their way at once")
	}
	does := map[protocol.OnFailure]string{protocol.PauseOnFailure: "pauses", protocol.RollbackOnFailure: "goes back"}[s.OnFailure]
	parts = append(parts, fmt.Sprintf("%s when more than %s failed", first(does, "stops"), first(string(s.MaxFailures), "0")))
	if !s.At.IsZero() {
		parts = append(parts, "not before "+s.At.Local().Format(time.DateTime))
	}
	for i, w := range s.Windows {
		parts = append(parts, []string{"only ", "or "}[min(i, 1)]+project.WindowText(w))
	}
	return strings.Join(parts, ", ")
}

func (a *app) rolloutWatchCommand() *cobra.Command {
	var verbose bool
	c := &cobra.Command{
		Use:   "watch [ID]",
		Short: "Follow a rollout until it has ended",
		Long: `Follow a rollout until it has ended, as deploy does: the newest one, or the one that is named. Ctrl-C
detaches. The exit status is deploy's: 0 only if every node confirmed, 1 if one failed or the rollout was
stopped or paused, 3 if some are offline and follow later.`,
		Example: `  nix-infra rollout watch
  nix-infra rollout watch 20260102-150405-abcd --verbose`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withRollout(c.Context(), append(args, client.Newest)[0], func(s *session, d *protocol.Deployment) error {
				return a.watchRollout(c.Context(), s, d.ID, verbose)
			})
		},
	}
	c.Flags().BoolVarP(&verbose, "verbose", "v", false, "print the build logs")
	return c
}
