package command

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

func (a *app) rolloutSteerCommand(v protocol.Verb) *cobra.Command {
	text := map[protocol.Verb][2]string{
		protocol.PauseRollout: {"Let no further node have it, until it is resumed", `Let no further node have a rollout until it is resumed. Nodes that are on their way go on, and end.`},
		protocol.ResumeRollout: {"Go on with a rollout that is paused", `Go on with a rollout that is paused. Where it paused because too many nodes failed, those are forgiven: it
takes as many new failures as --max-failures said to stop it again.`},
		protocol.AbortRollout: {"End a rollout: no further node gets it", `End a rollout: no further node gets it, for good. Nodes that have it keep it, and those that are on their
way go on; nix-infra rollout rollback takes it back.`},
	}[v]
	return &cobra.Command{
		Use:     string(v) + " ID",
		Short:   text[0],
		Long:    text[1],
		Example: fmt.Sprintf("  nix-infra rollout %s last\n  nix-infra rollout %s 20260102-150405-abcd", v, v),
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withRollout(c.Context(), args[0], func(s *session, d *protocol.Deployment) error {
				d, err := s.Steer(c.Context(), protocol.RolloutOrder{ID: d.ID, Verb: v})
				if err != nil {
					return err
				}
				if a.json {
					a.document(documentOfDeployment(d))
				}
				a.say("%s\n", ui.Clean(meaning(d)))
				return nil
			})
		},
	}
}

// meaning is what a rollout's state means for its nodes.
func meaning(d *protocol.Deployment) string {
	r := &d.Rollout
	text := fmt.Sprintf("rollout %s is %s", d.ID, stateText(r, time.Now()))
	given, left := r.Released, total(d)-r.Released
	if n := r.Unavailable; n > 0 {
		text += "; still on the way: " + nodes(n)
	}
	switch r.State {
	case protocol.RolloutPaused:
		return text + fmt.Sprintf("; %s got it, %d wait: nix-infra rollout resume %s goes on", nodes(given), left, d.ID)
	case protocol.RolloutAborted:
		return text + fmt.Sprintf("; %s got it and keep it, %d don't get it: nix-infra rollout rollback %s takes it back", nodes(given), left, d.ID)
	}
	return text + fmt.Sprintf("; %s got it, %d are to come: nix-infra rollout watch %s follows it", nodes(given), left, d.ID)
}

func (a *app) rolloutRollbackCommand() *cobra.Command {
	flags := rolloutFlags{back: true}
	c := &cobra.Command{
		Use:   "rollback ID",
		Short: "Take a rollout back: its nodes return to what they ran before it",
		Long: `Take a rollout back: every node that got it returns to what it ran before, as a deployment of its own that
is watched like any other. If the rollout has not ended it is aborted first. Nodes that a newer deployment has,
and those on which it failed or was rolled back, stay as they are.

All of them go back at once, and none is kept from it by others that fail, unless the flags say otherwise; of
the project's settings only max_unavailable holds.`,
		Example: `  nix-infra rollout rollback last
  nix-infra rollout rollback 20260102-150405-abcd --batch 25%`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return a.rollBack(c.Context(), args[0], &flags) },
	}
	flags.register(c.Flags(), &a.batch)
	return c
}

func (a *app) rollBack(ctx context.Context, id string, flags *rolloutFlags) error {
	me, err := a.identity()
	if err != nil {
		return err
	}
	if _, err := flags.order(me.project.Settings, protocol.Switch); err != nil {
		return err // before anything is asked
	}
	s, err := a.connectAs(ctx, me)
	if err != nil {
		return err
	}
	defer s.Close()
	d, err := findRollout(ctx, s, id)
	if err != nil {
		return err
	}
	if d.Mode == protocol.Reboot {
		return fmt.Errorf("deployment %s rebooted nodes: there is no system to take back", d.ID)
	}
	order, err := flags.order(me.project.Settings, d.Mode)
	if err != nil {
		return err
	}
	chosen, err := whoGot(ctx, s, d.ID)
	if err != nil {
		return err
	}
	if !d.Rollout.State.Ended() {
		if d, err = s.Steer(ctx, protocol.RolloutOrder{ID: d.ID, Verb: protocol.AbortRollout}); err != nil {
			return err
		}
		a.say("%s\n", ui.Clean(meaning(d)))
		if chosen, err = whoGot(ctx, s, d.ID); err != nil { // it may have got further
			return err
		}
	}
	p, err := makePlan(me.signer, order, chosen, rollbackTo(protocol.Rollback{Before: d.ID}), time.Now())
	if err != nil {
		return err
	}
	p.request.Undoes = d.ID
	return a.carryOut(ctx, s, p, flags)
}

// whoGot are the nodes that have a deployment, or are about to. A locked one among them is an error.
func whoGot(ctx context.Context, s *session, id string) ([]protocol.NodeState, error) {
	d, err := s.Deployment(ctx, protocol.DeploymentQuery{ID: id, Brief: true})
	if err != nil {
		return nil, err
	}
	counted := uint64(0) // above a node's serial: a way back that was signed with it
	if d.Strategy.OnFailure == protocol.RollbackOnFailure {
		counted = 1
	}
	var names []string
	for name, r := range d.Nodes {
		if r.Released && r.Superseded == "" && (!r.Phase.Ended() || r.Phase.Succeeded()) {
			names = append(names, name)
		}
	}
	var chosen []protocol.NodeState
	if len(names) > 0 { // else it would list all nodes
		if chosen, err = s.ListNodes(ctx, names...); err != nil {
			return nil, err
		}
	}
	chosen = slices.DeleteFunc(chosen, func(n protocol.NodeState) bool { // those that something newer has
		return n.Desired == nil || n.Desired.Deployment != id || n.Serial > d.Nodes[n.Name].Serial+counted
	})
	if len(chosen) == 0 {
		return nil, fmt.Errorf("no node has deployment %s (any more): there is nothing to take back", id)
	}
	return chosen, refuseLocked(chosen)
}
