package command

import (
	"bytes"
	"os"
	"testing"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

func TestTellPlans(t *testing.T) {
	alike := &protocol.UnitPlan{Stop: []string{"old.service"}, Start: []string{"new.service"}, Growth: -2048,
		Packages: []protocol.PackageChange{{Name: "bar", Before: []string{"1", ""}, Growth: -4096}, {Name: "foo", After: []string{"2"}, Growth: 2048}}}
	for name, c := range map[string]struct {
		plans map[string]*protocol.UnitPlan
		want  string
	}{
		"none": {nil, ""},
		"nothing to do": {map[string]*protocol.UnitPlan{"web1": {Size: 1 << 30}}, `
web1 would:
    leave every unit alone
    have a system of 1.0 GiB (+0 B)
`},
		"hostile": {map[string]*protocol.UnitPlan{"web1": {Stop: []string{"a\x1b[2J"}, Packages: []protocol.PackageChange{{Name: "b\x1b[2J\nc", Before: []string{"1"}, After: []string{"1"}, Growth: 1}}, More: 3}}, `
web1 would:
    stop a
    ~ b c 1 (+1 B)
    and 3 packages more
`},
		"many": {map[string]*protocol.UnitPlan{"web2": alike, "web1": alike, "db1": {Reload: []string{"new.service"}, Start: []string{"new.service"}, Secrets: []string{"db.password"}, Growth: 100}}, `
db1 would:
    reload new.service
    start new.service
    change the secrets db.password

web1 web2 would:
    stop old.service
    start new.service
    - bar 1, (no version) (-4.0 KiB)
    + foo 2 (+2.0 KiB)

in sum, 3 nodes would:
    stop old.service (2)
    reload new.service (1)
    start new.service (3)
    change the secrets db.password (1)
    - bar 1, (no version) (-8.0 KiB) on 2 nodes
    + foo 2 (+4.0 KiB) on 2 nodes
    have systems that are larger by -3.9 KiB
`},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			terminal, err := ui.New(&out, "never", os.Getenv)
			if err != nil {
				t.Fatal(err)
			}
			(&app{out: terminal}).tellPlans(c.plans)
			if out.String() != c.want {
				t.Errorf("got:\n%s\nwant:\n%s", out.String(), c.want)
			}
		})
	}
}
