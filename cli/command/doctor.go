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
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/protocol"
)

// symptomDocument is what `doctor` found of one thing, in --json.
type symptomDocument struct {
	Area  string `json:"area"`  // project, operator (this machine), controller or node
	About string `json:"about"` // a file, a URL or a node
	Check string `json:"check"`
	Level level  `json:"level"`
	What  string `json:"what"`
	Do    string `json:"do"` // "": nothing
}

// level is how much a finding matters.
type level string

const (
	fine    level = "ok"
	warning level = "warning"
	problem level = "problem"
	notSeen level = "left-out" // could not be looked at from here, or as who asks
)

var levelColours = map[level]ui.Colour{fine: ui.Green, warning: ui.Yellow, problem: ui.Red, notSeen: ui.Cyan}

// doctor is a look at everything.
type doctor struct {
	*app
	all     bool // shows what is fine, too
	area    string
	project *project.Project // with default settings where the folder is none
	me      *identity        // nil: nobody can be asked
	session *session         // nil: no controller answers
	every   []protocol.NodeState
	nodes   []protocol.NodeState // of every, those that are looked at
	counts  map[level]int
}

func (a *app) doctorCommand() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:   "doctor [SELECTOR]...",
		Short: "Look for what is wrong with the project, this machine, the controller and the nodes, and say what to do",
		Long: `Look for what is wrong, and say what to do about it:

  project     settings, .env, servers.yaml; whether each node's files can be composed; keys and who may read them; what git
              would see; secrets that are missing, overdue or stored as the earlier tool did; flake.lock; host keys
  this machine  the programs that some commands need, the disk, and the clock against the controller's
  controller  each of its URLs, its certificate's end, its version, etcd, the record and the disk
  nodes       whether each one is there, its agent's version and how long it lasts, what runs and what failed, the disk, the
              clock, the policy, and whether SSH is closed where it should be; all nodes, or those selected

Nothing is changed. What can't be looked at, because no controller answers or the role does not allow it, is said and left out.
The exit status is 1 where there is a problem.`,
		Example: `  nix-infra doctor
  nix-infra doctor @web --verbose
  nix-infra doctor --json | jq -r 'select(.level == "problem") | .what'`,
		RunE: func(c *cobra.Command, args []string) error {
			d := &doctor{app: a, all: all, counts: map[level]int{}}
			return d.run(c.Context(), args)
		},
	}
	c.Flags().BoolVarP(&all, "verbose", "v", false, "show what is fine, too")
	return c
}

func (d *doctor) run(ctx context.Context, selectors []string) error {
	if _, err := project.ParseSelector(selectors); err != nil && len(selectors) > 0 {
		return err
	}
	if d.openFolder() {
		d.openFleet(ctx)
		if d.session != nil {
			defer d.session.Close()
		}
		if err := d.choose(ctx, selectors); err != nil {
			return err
		}
		d.checkProject(ctx)
	}
	d.checkOperator()
	if d.me != nil {
		d.checkController(ctx)
		d.checkNodes(ctx)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	d.say("%s, %s, %d fine, %d left out\n", plural(d.counts[problem], "problem"), plural(d.counts[warning], "warning"), d.counts[fine], d.counts[notSeen])
	if d.counts[problem] > 0 {
		return &outcome{SomeFailed, nil}
	}
	return nil
}

// add shows a finding. what may be a node's or a controller's words.
func (d *doctor) add(l level, about, check, do, format string, args ...any) {
	d.counts[l]++
	what := message(fmt.Errorf(format, args...))
	if d.json {
		d.document(symptomDocument{d.area, about, check, l, what, do})
		return
	}
	if l == fine && !d.all {
		return
	}
	d.say("%s %s%s\n", d.out.Paint(levelColours[l], fmt.Sprintf("%-8s", l)), d.out.Paint(ui.Bold, ui.Clean(about)+": "), what)
	if do != "" {
		d.say("         %s\n", ui.Clean(do))
	}
}

// openFolder opens the folder, as far as it is a project, and tells whether there is more to look at in it.
func (d *doctor) openFolder() bool {
	d.area = "project"
	p, err := d.open()
	switch {
	case errors.Is(err, project.ErrNotInitialised):
		d.add(problem, d.dir, "settings", "nix-infra init -d "+d.dir, "it is not a project folder yet: there is no %s", project.SettingsFile)
	case err != nil:
		for line := range strings.SplitSeq(err.Error(), "\n") {
			d.add(problem, d.dir, "settings", "", "%s", line)
		}
		return false
	default:
		d.add(fine, project.SettingsFile, "settings", "", "it can be read")
	}
	d.project = p
	return true
}

// openFleet finds out as whom the fleet can be asked, and connects.
func (d *doctor) openFleet(ctx context.Context) {
	if _, err := d.readFleet(); err != nil {
		d.add(problem, d.own(fleetFile), "keys", "", "%w", err)
		return
	}
	me, err := d.identity()
	switch {
	case errors.Is(err, vault.ErrNoPassword) || errors.Is(err, vault.ErrNoKey):
		d.add(notSeen, "controller and nodes", "credentials", "", "nobody can be asked without credentials: %w", err)
		return
	case err != nil:
		d.add(problem, "credentials", "credentials", "", "nobody can be asked with them: %w", err)
		return
	}
	d.me = me
	if me.endsSoon(time.Now()) {
		d.add(warning, "credentials of "+me.Name, "credentials", "nix-infra access add, by an admin", "they end at %s", date(time.Unix(me.expires, 0)))
	}
	if len(me.project.Settings.Controllers) == 0 {
		d.add(warning, project.SettingsFile, "controllers", "nix-infra provision (migrate, for machines that run NixOS) or nix-infra enroll CTL --controller makes one, and its URL goes into controllers", "there is no controller yet, and nothing can be asked of the fleet")
		d.me = nil
		return
	}
	s, err := d.connectAs(ctx, me)
	if err == nil {
		d.session = s // the controller's part says why there is none
	}
}

// choose finds out which nodes are looked at. Without a controller they are those that the project names.
func (d *doctor) choose(ctx context.Context, selectors []string) error {
	if d.session != nil {
		var err error
		if d.every, err = d.session.ListNodes(ctx); err != nil {
			d.session.Close()
			d.session = nil
		}
	}
	if d.session == nil {
		for _, name := range d.namedNodes() {
			d.every = append(d.every, protocol.NodeState{NodeRecord: protocol.NodeRecord{Name: name, Tags: d.project.Settings.Nodes[name].Tags}})
		}
	}
	d.nodes = d.every
	if len(selectors) == 0 {
		return nil
	}
	var err error
	d.nodes, err = selectFrom(d.every, selectors)
	return err
}

// namedNodes are the nodes that the project names: in the settings, in servers.yaml, or by a file of their own.
func (d *doctor) namedNodes() []string {
	names, _ := d.project.NodeFiles() // what is wrong with them is found when they are composed
	for name := range d.project.Settings.Nodes {
		names = append(names, name)
	}
	servers, _ := d.project.Servers()
	for _, s := range servers {
		names = append(names, s.Name)
	}
	slices.Sort(names)
	return slices.Compact(names)
}
