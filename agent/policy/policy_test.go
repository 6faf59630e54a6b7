package policy

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/rule"
)

func TestParse(t *testing.T) {
	p, err := Parse([]byte(`{"v":1,"files":{"roots":["/var/lib/app","/srv/www"]}}`))
	if err != nil || !slices.Equal(p.Files.Roots, []string{"/var/lib/app", "/srv/www"}) {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err := Parse([]byte(`{"v":1}`)); err != nil || len(p.Files.Roots) != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	for _, c := range []struct{ text, says string }{
		{``, "can't be decoded"}, {`{}`, `"v"`}, {`{"v":2}`, "version 1"}, {`{"v":1}{"v":1}`, "follows"}, {`{"v":1,"file":{}}`, "unknown field"},
		{`{"v":1,"files":{"root":["/a"]}}`, "unknown field"}, {`{"v":1,"files":{"roots":"/a"}}`, "can't be decoded"},
		{`{"v":1,"files":{"roots":["/"]}}`, "files.roots"}, {`{"v":1,"files":{"roots":["a"]}}`, "files.roots"}, {`{"v":1,"files":{"roots":["/a/../etc"]}}`, "files.roots"},
		{`{"v":1,"files":{"roots":["/a/"]}}`, "files.roots"}, {`{"v":1,"files":{"roots":["/a\n"]}}`, "files.roots"}, {`{"v":1,"files":{"roots":[""]}}`, "files.roots"},
		{`{"v":1,"files":{"roots":[` + strings.Repeat(`"/a",`, 32) + `"/a"]}}`, "33 roots"}, {strings.Repeat(" ", maxFile+1), "more than"},
		{`{"v":1,"commands":[{"name":"a","program":"b","role":"viewer","rule":1}]}`, "unknown field"},
		{`{"v":1,"commands":[{"name":"a","program":"b"},{"name":"c","program":"../d"}]}`, `field "commands": rule 2, "c": program`},
		{`{"v":1,"commands":[{"name":"a","program":"b","options":[{"names":["-x"],"value":"("}]}]}`, `rule 1, "a": option`},
		{`{"v":1,"commands":[` + strings.Repeat(`{"name":"a","program":"b"},`, maxRules) + `{"name":"a","program":"b"}]}`, "129 rules"},
		{`{"v":1,"defaultCommands":"no"}`, "can't be decoded"}, {`{"v":1,"allowShell":"yes"}`, "allowShell"}, {`{"v":1,"allowShell":{"time":1}}`, "allowShell"},
		{`{"v":1,"allowShell":{"timeout":0}}`, "allowShell.timeout"}, {`{"v":1,"allowShell":{"timeout":86401}}`, "allowShell.timeout"},
		{`{"v":1,"tunnels":[{"address":"db"}]}`, `field "tunnels": rule 1`}, {`{"v":1,"tunnels":[{"address":"db:*"},{"address":"DB:1"}]}`, `field "tunnels": rule 2`},
		{`{"v":1,"tunnels":[{"address":"*:22"}]}`, "tunnels"}, {`{"v":1,"tunnels":[{"address":"db:1","role":"viewer"}]}`, "role"}, {`{"v":1,"tunnels":[{"address":"db:1","role":"node"}]}`, "role"},
		{`{"v":1,"uploads":{"roots":[{"path":"/"}]}}`, "uploads.roots"}, {`{"v":1,"uploads":{"roots":[{"path":"/nix/store"}]}}`, "the system's own"},
		{`{"v":1,"uploads":{"roots":[{"path":"/a","role":"viewer"}]}}`, "role"}, {`{"v":1,"uploads":{"roots":["/a"]}}`, "can't be decoded"},
		{`{"v":1,"actions":{"memory":1}}`, "actions.memory"}, {`{"v":1,"actions":{"tasks":-1}}`, "actions.tasks"}, {`{"v":1,"actions":{"timeout":-1}}`, "actions.timeout"},
	} {
		if _, err := Parse([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.80s: %v", c.text, err)
		}
	}
}

func parse(t *testing.T, text string) Policy {
	t.Helper()
	p, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCommands(t *testing.T) {
	const own = `"commands":[{"name":"app","program":"app-ctl","forms":[{"words":["status"]}]},
		{"name":"restart","program":"systemctl","role":"viewer","user":"root","forms":[{"words":["restart"],"operands":[{"what":"the app","pattern":"app"}]}]}]`
	may := func(p Policy, role protocol.Role, argv ...string) bool {
		_, err := rule.Match(p.Rules(), argv, role)
		return err == nil
	}
	for _, c := range []struct {
		policy                       string
		id, app, asks, loose, strict bool
	}{
		{`{"v":1}`, true, false, false, false, true},
		{`{"v":1,` + own + `}`, true, true, false, true, true},
		{`{"v":1,"defaultCommands":true,` + own + `}`, true, true, false, true, true},
		{`{"v":1,"defaultCommands":false,` + own + `}`, false, true, false, true, false},
		{`{"v":1,"defaultCommands":false}`, false, false, false, false, false},
	} {
		p := parse(t, c.policy)
		if got := may(p, protocol.Viewer, "id"); got != c.id {
			t.Errorf("%s: id: %v", c.policy, got)
		}
		if got := may(p, protocol.Operator, "app-ctl", "status"); got != c.app {
			t.Errorf("%s: a rule of the node's own: %v", c.policy, got)
		}
		if got := may(p, protocol.Viewer, "app-ctl", "status"); got != c.asks {
			t.Errorf("%s: a rule without a role, for a viewer: %v", c.policy, got)
		}
		if got := may(p, protocol.Viewer, "systemctl", "restart", "app"); got != c.loose {
			t.Errorf("%s: a rule that loosens: %v", c.policy, got)
		}
		if got := may(p, protocol.Operator, "systemctl", "restart", "nginx"); got != c.strict {
			t.Errorf("%s: a default rule beside it: %v", c.policy, got)
		}
	}
}

func TestShellAndActions(t *testing.T) {
	for text, timeout := range map[string]int{`true`: defaultTimeout, `{}`: defaultTimeout, `{"timeout":60}`: 60} {
		if p := parse(t, `{"v":1,"allowShell":`+text+`}`); p.Shell == nil || p.Shell.Timeout != timeout {
			t.Errorf("%s: %+v", text, p.Shell)
		}
	}
	for _, text := range []string{`{"v":1}`, `{"v":1,"allowShell":false}`, `{"v":1,"allowShell":null}`} {
		if p := parse(t, text); p.Shell != nil {
			t.Errorf("%s: %+v", text, p.Shell)
		}
	}
	if a := (Policy{}).ActionLimits(); a != (Actions{defaultMemory, defaultTasks, defaultTimeout}) {
		t.Errorf("%+v", a)
	}
	if a := parse(t, `{"v":1,"actions":{"memory":33554432,"timeout":5}}`).ActionLimits(); a != (Actions{32 << 20, defaultTasks, 5}) {
		t.Errorf("%+v", a)
	}
}

func TestLoad(t *testing.T) {
	system := t.TempDir()
	if p, err := Load(system); err != nil || p.Files.Roots != nil {
		t.Errorf("without a file: %+v, %v", p, err)
	}
	file := filepath.Join(system, File)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	for text, good := range map[string]bool{`{"v":1,"files":{"roots":["/a"]}}`: true, `{"v":3}`: false} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if p, err := Load(system); (err == nil) != good || good && p.Files.Roots[0] != "/a" {
			t.Errorf("%s: %+v, %v", text, p, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"v":1,"files":{"roots":["/var/lib/app"]}}`))
	f.Add([]byte(`{"v":1,"commands":[{"name":"a","program":"b","options":[{"names":["-x"],"value":"[a-z]+","optional":true}],"defaults":["-x"],"forms":[{"words":["show|list"]}]}]}`))
	f.Add([]byte(`{"v":1,"allowShell":{"timeout":60},"tunnels":[{"address":"db:*","role":"admin"}],"uploads":{"roots":[{"path":"/srv"}]},"actions":{"tasks":9}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse(data)
		if err != nil {
			return
		}
		for _, r := range p.Files.Roots {
			if r == "/" || !filepath.IsAbs(r) || filepath.Clean(r) != r {
				t.Fatalf("root %q", r)
			}
		}
		if a := p.ActionLimits(); a.Memory < leastMemory || a.Tasks < 1 || a.Timeout < 1 {
			t.Fatalf("%+v", a)
		}
		for _, r := range p.Rules() {
			if err := r.Validate(); err != nil {
				t.Fatal(err)
			}
		}
		_, _, _ = p.Reach("db:22", protocol.Admin, func() ([]netip.Addr, error) { return nil, nil })
	})
}
