package command

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// garbageDocument is what a node removed, in `gc --json`.
type garbageDocument struct {
	Node    string               `json:"node"`
	DryRun  bool                 `json:"dry_run"`
	Removed []generationDocument `json:"removed"`
	Kept    int                  `json:"kept"`
	Paths   int                  `json:"paths"`
	Freed   int64                `json:"freed"`
}

type gcOptions struct {
	olderThan string
	keep      int
	dryRun    bool
	timeout   time.Duration
}

func (a *app) gcCommand() *cobra.Command {
	var o gcOptions
	c := &cobra.Command{
		Use:   "gc SELECTOR...",
		Short: "Remove old generations of nodes, and what nothing needs any more from their stores",
		Long: `Remove old generations of nodes, and what nothing needs any more from their stores. A generation goes if
it is older than --older-than and not among the newest --keep.

What runs, what was and will be booted, what the next rollback would go to and what is in quarantine
stays, whatever the flags say. Collecting can take many minutes: Ctrl-C stops waiting, and the nodes go on.`,
		Example: `  nix-infra gc all
  nix-infra gc @web --older-than 30d --keep 3 --dry-run
  nix-infra gc db1 --older-than 0 --keep 1 --timeout 2h`,
		Args: someNodes("collect the garbage of which nodes?", "gc"),
		RunE: func(c *cobra.Command, args []string) error { return a.gc(c.Context(), args, o) },
	}
	f := c.Flags()
	f.StringVar(&o.olderThan, "older-than", "14d", "age from which on generations go, such as 14d or 12h")
	f.IntVar(&o.keep, "keep", 5, "so many of the newest generations stay")
	f.BoolVar(&o.dryRun, "dry-run", false, "only say which generations would go")
	f.DurationVar(&o.timeout, "timeout", 30*time.Minute, "how long to wait for the nodes")
	return withTarget(c)
}

func (a *app) gc(ctx context.Context, selectors []string, o gcOptions) error {
	old, err := project.ParseAge(o.olderThan)
	if err != nil {
		return fmt.Errorf("--older-than: %w", err)
	}
	if o.keep < 0 {
		return fmt.Errorf("--keep %d: use 0 or more", o.keep)
	}
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	chosen, err := a.selected(ctx, s.Client, selectors)
	if err != nil {
		return err
	}
	names := namesOf(chosen)
	var live *ui.Live
	if !a.json {
		live = a.out.Live("collecting garbage")
		defer live.Close()
		for _, n := range names {
			live.Set(n, "collecting", ui.Active)
		}
	}
	var freed int64
	removed, done := 0, map[string]bool{}
	request := protocol.GarbageRequest{OlderThan: int64(old.Seconds()), Keep: o.keep, DryRun: o.dryRun}
	r, err := ask(ctx, s, names, protocol.CollectGarbage, request, o.timeout, func(node string, g protocol.GarbageReport) {
		freed += g.Freed
		removed += len(g.Removed)
		done[node] = true
		if live != nil {
			live.Set(node, collected(g, o.dryRun), ui.Good)
			return
		}
		d := garbageDocument{node, o.dryRun, []generationDocument{}, g.Kept, g.Paths, g.Freed}
		for _, gone := range g.Removed {
			d.Removed = append(d.Removed, documentOfGeneration(node, gone))
		}
		a.document(d)
	})
	if live != nil {
		for _, n := range names {
			switch {
			case slices.Contains(r.silent, n):
				live.Set(n, "no answer", ui.Waiting)
			case !done[n]:
				live.Set(n, "refused or failed", ui.Bad)
			}
		}
		live.Close()
	}
	switch {
	case ctx.Err() != nil:
		return &outcome{Interrupted, fmt.Errorf("no longer waiting; nodes that have begun go on collecting")}
	case err != nil:
		return err
	case o.dryRun:
		a.say("%s would go\n", plural(removed, "generation"))
	default:
		a.say("%s freed by removing %s\n", size(freed), plural(removed, "generation"))
	}
	return r.outcome()
}

// collected is what came of collecting on a node, in a line.
func collected(g protocol.GarbageReport, dryRun bool) string {
	var gone []string
	for _, r := range g.Removed {
		gone = append(gone, strconv.Itoa(r.Number))
	}
	list := ""
	if len(gone) > 0 {
		list = " (" + strings.Join(gone, " ") + ")"
	}
	if dryRun {
		return fmt.Sprintf("%s would go%s, %d stay", plural(len(gone), "generation"), list, g.Kept)
	}
	return fmt.Sprintf("%s freed; %s removed%s, %d stay", size(g.Freed), plural(len(gone), "generation"), list, g.Kept)
}

// plural is "1 generation" or "2 generations".
func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
