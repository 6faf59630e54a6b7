package command

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// tellPlans shows what a switch would do on each node and, of several, in sum. Nodes on which it would do the same
// are told of together.
func (a *app) tellPlans(plans map[string]*protocol.UnitPlan) {
	alike := map[string][]string{}
	for _, node := range slices.Sorted(maps.Keys(plans)) {
		key := string(protocol.Encode(plans[node]))
		alike[key] = append(alike[key], node)
	}
	groups := slices.SortedFunc(maps.Values(alike), func(x, y []string) int { return strings.Compare(x[0], y[0]) })
	for _, names := range groups {
		a.say("\n%s would:\n", a.out.Paint(ui.Bold, ui.Clean(some(names))))
		a.tellPlan(plans[names[0]])
	}
	if len(plans) > 1 {
		a.tellSum(plans)
	}
}

// verb is one of the lists of a plan, of units or of secrets, and how it is shown.
type verb struct {
	word   string
	units  func(*protocol.UnitPlan) []string
	colour ui.Colour
}

var verbs = []verb{
	{"stop", func(p *protocol.UnitPlan) []string { return p.Stop }, ui.Red},
	{"restart", func(p *protocol.UnitPlan) []string { return p.Restart }, ui.Yellow},
	{"reload", func(p *protocol.UnitPlan) []string { return p.Reload }, ui.Cyan},
	{"start", func(p *protocol.UnitPlan) []string { return p.Start }, ui.Green},
	{"change the secrets", func(p *protocol.UnitPlan) []string { return p.Secrets }, ui.Yellow},
}

func (a *app) tellPlan(p *protocol.UnitPlan) {
	still := true
	for _, v := range verbs {
		if units := v.units(p); len(units) > 0 {
			still = false
			a.say("    %s %s\n", a.out.Paint(v.colour, v.word), ui.Clean(strings.Join(units, " ")))
		}
	}
	if still {
		a.say("    leave every unit alone\n")
	}
	for _, c := range p.Packages {
		a.say("    %s\n", a.packageLine(c))
	}
	if p.More > 0 {
		a.say("    and %s more\n", plural(p.More, "package"))
	}
	if p.Size > 0 {
		a.say("    have a system of %s (%s)\n", size(p.Size), growth(p.Growth))
	}
}

// packageLine is "+ curl 8.1 (+1.0 MiB)", "- curl 8.1 (-1.0 MiB)" or "~ curl 8.1 → 8.2 (+12 B)".
func (a *app) packageLine(c protocol.PackageChange) string {
	sign, colour, versions := "~", ui.Yellow, versionList(c.Before)+" → "+versionList(c.After)
	switch {
	case len(c.Before) == 0:
		sign, colour, versions = "+", ui.Green, versionList(c.After)
	case len(c.After) == 0:
		sign, colour, versions = "-", ui.Red, versionList(c.Before)
	case slices.Equal(c.Before, c.After):
		versions = versionList(c.After)
	}
	return fmt.Sprintf("%s %s %s (%s)", a.out.Paint(colour, sign), ui.Clean(c.Name), ui.Clean(versions), growth(c.Growth))
}

func versionList(versions []string) string {
	shown := make([]string, len(versions))
	for i, v := range versions {
		shown[i] = first(v, "(no version)")
	}
	return strings.Join(shown, ", ")
}

// growth is a difference of bytes, with its sign.
func growth(n int64) string {
	if n < 0 {
		return "-" + size(-n)
	}
	return "+" + size(n)
}

// planSum is what a switch would do on all nodes together.
type planSum struct {
	units    map[string]map[string]int // by verb and unit, the number of nodes
	packages map[string]*packageSum    // by what becomes of which package
	growth   int64
}

type packageSum struct {
	change protocol.PackageChange // Growth is that of all nodes
	nodes  int
}

func sumUp(plans map[string]*protocol.UnitPlan) planSum {
	s := planSum{units: map[string]map[string]int{}, packages: map[string]*packageSum{}}
	for _, p := range plans {
		for _, v := range verbs {
			for _, u := range v.units(p) {
				if s.units[v.word] == nil {
					s.units[v.word] = map[string]int{}
				}
				s.units[v.word][u]++
			}
		}
		for _, c := range p.Packages {
			key := fmt.Sprintf("%s %q %q", c.Name, c.Before, c.After)
			if s.packages[key] == nil {
				s.packages[key] = &packageSum{change: protocol.PackageChange{Name: c.Name, Before: c.Before, After: c.After}}
			}
			s.packages[key].change.Growth += c.Growth
			s.packages[key].nodes++
		}
		s.growth += p.Growth
	}
	return s
}

func (a *app) tellSum(plans map[string]*protocol.UnitPlan) {
	s := sumUp(plans)
	a.say("\n%s would:\n", a.out.Paint(ui.Bold, "in sum, "+nodes(len(plans))))
	for _, v := range verbs {
		if len(s.units[v.word]) == 0 {
			continue
		}
		var parts []string
		for _, u := range slices.Sorted(maps.Keys(s.units[v.word])) {
			parts = append(parts, fmt.Sprintf("%s (%d)", u, s.units[v.word][u]))
		}
		a.say("    %s %s\n", a.out.Paint(v.colour, v.word), ui.Clean(strings.Join(parts, " ")))
	}
	for _, key := range slices.Sorted(maps.Keys(s.packages)) {
		p := s.packages[key]
		a.say("    %s on %s\n", a.packageLine(p.change), nodes(p.nodes))
	}
	a.say("    have systems that are larger by %s\n", growth(s.growth))
}
