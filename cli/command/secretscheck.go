package command

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/cli/vault"
)

// problemDocument is one thing that `secrets check` found, in --json.
type problemDocument struct {
	Name    string   `json:"name"` // of the secret; "": it is about the project
	Problem string   `json:"problem"`
	Nodes   []string `json:"nodes"`
	Text    string   `json:"text"`

	harmless bool
}

// What check finds.
const (
	foundMissing    = "missing"    // a node's file names it, and it isn't there
	foundDamaged    = "damaged"    // it does not open
	foundLegacy     = "legacy"     // it is stored as the earlier tool did
	foundDue        = "due"        // it is older than it should become
	foundUnfinished = "unfinished" // a rotation or a rekey was interrupted
	foundReaders    = "readers"    // the recipients' file names others than those that can read it
	foundUnused     = "unused"     // no node's file names it
)

func (a *app) secretsCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Look for secrets that are missing, damaged, unused or too old",
		Long: `Look at all secrets of the project: which are missing that a node's file names, which don't open, which are stored as
the earlier tool did, which are older than nix-infra.yaml lets them become (secrets.NAME.max_age, and
defaults.secret_max_age for all), and which no node uses. Nothing is asked of the fleet. The exit status is 1 where
something is wrong; a secret that no node uses is only told of.`,
		Example: `  nix-infra secrets check
  nix-infra secrets check --json | jq -r 'select(.problem == "due") | .name'`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return a.secretsCheck() },
	}
}

func (a *app) secretsCheck() error {
	p, err := a.openProject()
	if err != nil {
		return err
	}
	found, total, err := a.findings(p)
	if err != nil {
		return err
	}
	wrong := 0
	for _, f := range found {
		colour := ui.Yellow
		if !f.harmless {
			colour = ui.Red
			wrong++
		}
		if a.json {
			a.document(f)
			continue
		}
		a.say("%s %s\n", a.out.Paint(colour, f.Problem), ui.Clean(f.Text))
	}
	a.say("%s, %d wrong\n", plural(total, "secret"), wrong)
	if wrong > 0 {
		return &outcome{SomeFailed, nil}
	}
	return nil
}

func (a *app) findings(p *project.Project) (found []problemDocument, total int, err error) {
	s := a.secretStore(p)
	add := func(problem, name string, nodes []string, format string, args ...any) {
		found = append(found, problemDocument{name, problem, list(nodes), fmt.Sprintf(format, args...), problem == foundUnused})
	}
	names, err := s.Names()
	if err != nil {
		return nil, 0, err
	}
	uses, err := usesOf(p)
	if err != nil {
		return nil, 0, err
	}
	for _, name := range slices.Sorted(maps.Keys(uses)) {
		if !s.Has(name) {
			add(foundMissing, name, usersOf(uses[name]), "%s: named by %s, first in %s; store it: nix-infra secrets store %s", name, some(usersOf(uses[name])), uses[name][0].At, name)
		}
	}
	legacy, err := s.LegacyNames()
	if err != nil {
		return nil, 0, err
	}
	s.Quiet()
	for _, name := range names {
		d := documentOfSecret(p, s, name, uses)
		_, err := s.Get(name)
		if errors.Is(err, vault.ErrNoPassword) || errors.Is(err, vault.ErrNoKey) {
			return nil, 0, err
		}
		if err != nil {
			add(foundDamaged, name, d.Nodes, "%v", err)
		}
		if slices.Contains(legacy, name) {
			add(foundLegacy, name, d.Nodes, "%s: a file of the earlier tool is there; run nix-infra secrets migrate", name)
		}
		if d.Due != nil && time.Now().After(*d.Due) {
			add(foundDue, name, d.Nodes, "%s: since %s; nix-infra secrets rotate %s", name, d.Due.Format(time.DateOnly), name)
		}
		if d.Pending {
			add(foundUnfinished, name, d.Nodes, "%s: its rotation was interrupted; nix-infra secrets rotate %s --resume goes on with it", name, name)
		}
		if len(d.Nodes) == 0 && !strings.HasPrefix(name, project.TrustedKeysPrefix) {
			add(foundUnused, name, nil, "%s: no node's file names it", name)
		}
	}
	err = a.checkReaders(p, func(problem, text string) { add(problem, "", nil, "%s", text) })
	return found, len(names), err
}

// checkReaders compares who can read the project with who should.
func (a *app) checkReaders(p *project.Project, add func(problem, text string)) error {
	v := a.vault(p.Env.Get)
	wanted, err := v.Recipients()
	if err != nil {
		return err
	}
	if v.Empty() {
		return nil
	}
	readers, unfinished, err := v.Readers()
	switch {
	case err != nil:
		return err
	case unfinished:
		add(foundUnfinished, "a rekey was interrupted; nix-infra secrets rekey goes on with it")
	case !slices.Equal(slices.Sorted(slices.Values(readers)), slices.Sorted(slices.Values(wanted))):
		add(foundReaders, a.own(recipientsFile)+" names others than those that can read the project; nix-infra secrets rekey")
	}
	return nil
}
