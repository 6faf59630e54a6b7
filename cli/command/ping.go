package command

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// pingDocument is a node's answer in `ping --json`.
type pingDocument struct {
	Node     string  `json:"node"`
	Answered bool    `json:"answered"`
	Ms       float64 `json:"ms"` // 0 where it did not answer
	Agent    string  `json:"agent"`
	Clock    float64 `json:"clock"` // seconds by which the node's clock is ahead of ours
	Refused  string  `json:"refused,omitempty"`
}

// pinged reads a node's answer. Its clock was read at some time between asking and now.
func pinged(node string, started, now time.Time, r *protocol.Reply, err error) pingDocument {
	d := pingDocument{Node: node, Answered: true, Ms: float64(now.Sub(started).Microseconds()) / 1000}
	var pong protocol.Pong
	if err == nil && len(r.Body) > 0 {
		err = json.Unmarshal(r.Body, &pong) // a newer agent may say more
	}
	if err != nil {
		d.Refused = ui.Clean(err.Error())
		return d
	}
	d.Agent = ui.Clean(fmt.Sprintf("%.64s", pong.Agent))
	switch t := pong.Time; {
	case t.IsZero():
	case t.After(now):
		d.Clock = t.Sub(now).Seconds()
	case t.Before(started):
		d.Clock = t.Sub(started).Seconds()
	}
	return d
}

// clockOff is from where on a node's clock is worth a word: at protocol.ClockSkew it refuses orders.
const clockOff = 5 * time.Second

func (a *app) pingLine(d pingDocument) string {
	if d.Refused != "" {
		return a.out.Paint(ui.Red, "refused: "+d.Refused)
	}
	line := a.out.Paint(ui.Green, fmt.Sprintf("%.1f ms", d.Ms))
	if d.Agent != "" {
		line += ", agent " + d.Agent
	}
	if off := time.Duration(d.Clock * float64(time.Second)).Round(time.Second); off.Abs() >= clockOff {
		word := "ahead of"
		if off < 0 {
			word = "behind"
		}
		line += a.out.Paint(ui.Yellow, fmt.Sprintf(", its clock is %s %s ours", off.Abs(), word))
	}
	return line
}

// broadcastFrom is from how many nodes on one broadcast, which the whole fleet answers, costs less than
// a signature for each.
const broadcastFrom = 16

func (a *app) pingCommand() *cobra.Command {
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "ping [SELECTOR]...",
		Short: "Ask nodes whether they are there",
		Long:  `Ask nodes (all, if none is selected) whether they are there. The exit status is 3 if one does not answer.`,
		Example: `  nix-infra ping
  nix-infra ping @web --timeout 2s`,
		RunE: func(c *cobra.Command, args []string) error { return a.ping(c.Context(), args, timeout) },
	}
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "how long to wait for answers")
	return c
}

func (a *app) ping(ctx context.Context, selectors []string, timeout time.Duration) error {
	session, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer session.Close()
	nodes, err := a.selected(ctx, session.Client, selectors)
	if err != nil {
		return err
	}
	var names []string
	for _, n := range nodes {
		names = append(names, n.Name)
	}
	started, refused := time.Now(), 0
	each := func(node string, r *protocol.Reply, err error) {
		d := pinged(node, started, time.Now(), r, err)
		if d.Refused != "" {
			refused++
		}
		if a.json {
			a.document(d)
		} else {
			a.out.Printf("%s: %s\n", node, a.pingLine(d))
		}
	}
	waiting, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ask := session.AskMany
	if len(names) >= broadcastFrom {
		ask = func(ctx context.Context, names []string, action protocol.Action, payload any, each client.Each) ([]string, error) {
			return session.Broadcast(ctx, action, payload, names, each)
		}
	}
	silent, err := ask(waiting, names, protocol.Ping, nil, each)
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if a.json {
		for _, n := range silent {
			a.document(pingDocument{Node: n})
		}
	}
	a.say("%d of %d answered\n", len(names)-len(silent), len(names))
	switch {
	case len(silent) > 0:
		return &outcome{Unanswered, fmt.Errorf("no answer from %s", strings.Join(silent, " "))}
	case refused > 0:
		return &outcome{SomeFailed, fmt.Errorf("%d nodes refused", refused)}
	}
	return nil
}
