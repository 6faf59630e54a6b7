package command

import (
	"strings"
	"testing"
)

// parsed is a command line as its command has it: the command's path, its flags and what stands alone.
func parsed(t *testing.T, args []string) (path string, flags map[string]string, words []string) {
	t.Helper()
	root := (&app{}).root()
	c, rest, err := root.Find(joinBatch(root, args))
	if err == nil {
		err = c.ParseFlags(rest)
	}
	if err != nil {
		t.Errorf("%q: %v", args, err)
		return
	}
	flags = map[string]string{}
	for _, name := range []string{"working-dir", "env", "batch", "debug", "ssh-key", "target", "node-names", "nixos-version", "location", "machine-type", "placement-group", "mutation", "node-module",
		"service-group", "ctrl-nodes", "cluster-uuid", "test-dir", "rebuild", "app-module", "cmd", "env-vars", "save-as-secret", "local-port", "remote-port", "name", "no-cert-auth", "provider"} {
		f := c.Flags().Lookup(name)
		if f == nil || !f.Changed && name != "rebuild" {
			continue
		}
		flags[name] = strings.Trim(f.Value.String(), "[]")
	}
	return c.CommandPath(), flags, c.Flags().Args()
}

// TestOlderArgv: every call that the templates make is taken apart into the same command, flags and words, however it is
// spelled: options before and after what stands alone, before and after the command, with = and as a word of their own, --batch
// anywhere. What comes of them is in the tests of the commands.
func TestOlderArgv(t *testing.T) {
	for _, c := range []struct {
		id     string
		calls  []string // words are separated by |
		path   string
		flags  string // name=value, separated by |, besides working-dir=W, env=E and batch
		words  string
		noEnv  bool
		silent bool // not --batch
	}{
		{id: "C1", calls: []string{"init|-d|W|--env=E|--batch", "init|--batch|--env|E|-d=W", "--batch|-d|W|init|--env=E", "init|--working-dir=W|--env=E|--batch"}, path: "init"},
		{id: "C2", calls: []string{"init|-d|W|--env=E|--no-cert-auth|--batch", "init|--no-cert-auth|--batch|-d|W|--env|E"}, path: "init", flags: "no-cert-auth=true"},
		{id: "C3", calls: []string{
			"cluster|provision|-d|W|--batch|--env=E|--nixos-version=25.05|--ssh-key=k|--location=hel1|--machine-type=cpx21|--node-names=etcd001  service001|--placement-group=g",
			"cluster|-d|W|--env=E|--ssh-key|k|provision|--node-names|etcd001  service001|--placement-group|g|--machine-type|cpx21|--location|hel1|--nixos-version|25.05|--batch"},
			path: "cluster provision", flags: "ssh-key=k|node-names=etcd001  service001|nixos-version=25.05|location=hel1|machine-type=cpx21|placement-group=g"},
		{id: "C4", calls: []string{"fleet|provision|-d|W|--batch|--env=E|--nixos-version=25.11|--ssh-key=k|--location=hel1|--machine-type=cpx22|--node-names=n1 n2|--mutation=vmware|--provider=hetzner"},
			path: "fleet provision", flags: "ssh-key=k|node-names=n1 n2|nixos-version=25.11|location=hel1|machine-type=cpx22|mutation=vmware|provider=hetzner"},
		{id: "C5", calls: []string{"cluster|init-ctrl|-d|W|--batch|--env=E|--nixos-version=25.05|--cluster-uuid=u|--target=etcd001", "--env=E|cluster|init-ctrl|--target|etcd001|--cluster-uuid|u|--batch|--nixos-version|25.05|-d|W"},
			path: "cluster init-ctrl", flags: "target=etcd001|nixos-version=25.05|cluster-uuid=u|rebuild=true"},
		{id: "C6", calls: []string{"cluster|init-node|-d|W|--batch|--env=E|--nixos-version=25.05|--target=s1 s2|--node-module=node_types/x.nix|--service-group=|--ctrl-nodes=etcd001"},
			path: "cluster init-node", flags: "target=s1 s2|nixos-version=25.05|node-module=node_types/x.nix|service-group=|ctrl-nodes=etcd001|rebuild=true"},
		{id: "C7", calls: []string{"cluster|update-node|-d|W|--batch|--env=E|--nixos-version=25.05|--node-module=f|--ctrl-nodes=etcd001|--target=s1", "cluster|update-node|--target|s1|-d|W|--ctrl-nodes|etcd001|--env|E|--node-module|f|--nixos-version|25.05|--batch"},
			path: "cluster update-node", flags: "target=s1|nixos-version=25.05|node-module=f|ctrl-nodes=etcd001|rebuild=false"},
		{id: "C8", calls: []string{"cluster|deploy-apps|-d|W|--batch|--env=E|--test-dir=W/__test__/T|--target=a b"}, path: "cluster deploy-apps", flags: "target=a b|test-dir=W/__test__/T|rebuild=false"},
		{id: "C9", calls: []string{"cluster|cmd|-d|W|--env=E|--target=a b|echo x | wc", "cluster|cmd|echo x | wc|--target=a b|--env|E|-d|W", "cluster|--env=E|-d|W|cmd|--target|a b|echo x | wc"},
			path: "cluster cmd", flags: "target=a b", words: "echo x | wc", silent: true},
		{id: "C10", calls: []string{"cluster|ssh|-d|W|--env=E|--target=a", "cluster|ssh|--target|a|--env|E|-d=W"}, path: "cluster ssh", flags: "target=a", silent: true},
		{id: "C11", calls: []string{"cluster|action|-d|W|--env=E|--target=a|--app-module=m|--cmd=create --name=x|--env-vars=A=1,B=2|--save-as-secret=s", "cluster|action|--save-as-secret|s|--env-vars|A=1,B=2|--cmd|create --name=x|--app-module|m|--target|a|--env|E|-d|W"},
			path: "cluster action", flags: "target=a|app-module=m|cmd=create --name=x|env-vars=\"A=1,B=2\"|save-as-secret=s", silent: true},
		{id: "C12", calls: []string{"cluster|etcd|services|-d|W|--env=E|--target=a b", "cluster|etcd|--target=a b|services|--env|E|-d|W", "cluster|-d|W|etcd|--env=E|services|--target|a b"}, path: "cluster etcd services", flags: "target=a b", silent: true},
		{id: "C13", calls: []string{"cluster|etcd|ctl|del --prefix /x|-d|W|--target=a"}, path: "cluster etcd ctl", flags: "target=a", words: "del --prefix /x", silent: true, noEnv: true},
		{id: "C14", calls: []string{"cluster|etcd|get --prefix /nodes|-d|W|--env=E|--target=a"}, path: "cluster etcd", flags: "target=a", words: "get --prefix /nodes", silent: true},
		{id: "C15", calls: []string{"cluster|port-forward|-d|W|--env=E|--target=a|--local-port=1|--remote-port=2", "cluster|port-forward|--remote-port|2|--local-port|1|--target|a|-d|W|--env|E"}, path: "cluster port-forward", flags: "target=a|local-port=1|remote-port=2", silent: true},
		{id: "C16", calls: []string{"cluster|upgrade-nixos|-d|W|--env=E|--batch|--nixos-version=25.11|--target=a b"}, path: "cluster upgrade-nixos", flags: "target=a b|nixos-version=25.11"},
		{id: "C17", calls: []string{"cluster|destroy|-d|W|--env=E|--batch|--target=a b|--ctrl-nodes=etcd001"}, path: "cluster destroy", flags: "target=a b|ctrl-nodes=etcd001"},
		{id: "C19", calls: []string{"secrets|store|-d|W|--batch|--env=E|--name=s", "secrets|-d|W|--env|E|store|--name|s|--batch"}, path: "secrets store", flags: "name=s"},
		{id: "C20", calls: []string{"ssh-key|remove|-d|W|--env=E|--batch|--name=k", "ssh-key|--env=E|-d=W|remove|--name|k|--batch"}, path: "ssh-key remove", flags: "name=k"},
		{id: "C21", calls: []string{"fleet|init-machine|-d|W|--batch|--env=E|--nixos-version=25.11|--target=a b|--node-module=f"}, path: "fleet init-machine", flags: "target=a b|nixos-version=25.11|node-module=f"},
		{id: "C22", calls: []string{"fleet|update|-d|W|--env=E|--batch|--nixos-version=25.11|--target=a b|--node-module=f|--no-rebuild", "fleet|update|--no-rebuild|--batch|--node-module|f|--target|a b|--nixos-version|25.11|--env|E|-d|W",
			"fleet|update|--rebuild|--no-rebuild|-d|W|--env=E|--nixos-version=25.11|--batch|--target=a b|--node-module=f"}, path: "fleet update", flags: "target=a b|nixos-version=25.11|node-module=f|rebuild=false"},
		{id: "C22", calls: []string{"fleet|update|-d|W|--env=E|--batch|--nixos-version=25.11|--target=a|--node-module=f|--rebuild"}, path: "fleet update", flags: "target=a|nixos-version=25.11|node-module=f|rebuild=true"},
		{id: "C23", calls: []string{"fleet|deploy-apps|-d|W|--batch|--env=E|--debug|--test-dir=D|--target=a b", "fleet|--debug|deploy-apps|--target|a b|--test-dir|D|--env|E|--batch|-d|W"}, path: "fleet deploy-apps", flags: "debug=true|target=a b|test-dir=D|rebuild=true"},
		{id: "C24", calls: []string{"fleet|cmd|-d|W|--env=E|--target=a|nixos-rebuild switch --fast", "fleet|cmd|nixos-rebuild switch --fast|-d|W|--env=E|--target=a"}, path: "fleet cmd", flags: "target=a", words: "nixos-rebuild switch --fast", silent: true},
		{id: "C24", calls: []string{"fleet|ssh|-d|W|--env=E|--ssh-key=k|--target=a"}, path: "fleet ssh", flags: "ssh-key=k|target=a", silent: true},
		{id: "C24", calls: []string{"fleet|upgrade-nixos|-d|W|--env=E|--batch|--nixos-version=25.11|--target=a"}, path: "fleet upgrade-nixos", flags: "target=a|nixos-version=25.11"},
		{id: "C24", calls: []string{"fleet|destroy|-d|W|--env=E|--batch|--target=a b", "destroy|-d|W|--env=E|--target=a b|--batch"}, path: "destroy", flags: "target=a b"},
		{id: "flat", calls: []string{"provision|-d|W|--batch|--env=E|--node-names=a b|--nixos-version=25.11|--ssh-key=k"}, path: "provision", flags: "ssh-key=k|node-names=a b|nixos-version=25.11"},
		{id: "flat", calls: []string{"update-node|-d|W|--batch|--env=E|--target=a|--ssh-key=k"}, path: "update-node", flags: "ssh-key=k|target=a|rebuild=true"},
	} {
		for _, call := range c.calls {
			args := strings.Split(strings.ReplaceAll(call, " | ", "\x00"), "|")
			for i := range args {
				args[i] = strings.ReplaceAll(args[i], "\x00", " | ")
			}
			path, flags, words := parsed(t, args)
			if !strings.HasSuffix(path, " "+c.path) {
				t.Errorf("%s %q: is %s", c.id, args, path)
			}
			want := map[string]string{"working-dir": "W", "env": "E", "batch": "true"}
			if c.noEnv {
				delete(want, "env")
			}
			if c.silent {
				delete(want, "batch")
			}
			for _, pair := range strings.Split(c.flags, "|") {
				if name, value, ok := strings.Cut(pair, "="); ok {
					want[name] = value
				}
			}
			if f := flags["batch"]; f == "" { // where there are waves, it has no value to show
				if _, given := flags["batch"]; given {
					flags["batch"] = "true"
				}
			}
			for name, value := range want {
				if got, given := flags[name]; !given || got != value {
					t.Errorf("%s %q: --%s is %q, want %q", c.id, args, name, got, value)
				}
				delete(flags, name)
			}
			if len(flags) > 0 || strings.Join(words, " ") != c.words {
				t.Errorf("%s %q: besides %v, and the words %q", c.id, args, flags, words)
			}
		}
	}
}

// Whatever is on or off may be said with no- before it, as to the earlier tool, and the last word counts.
func TestNegatedFlags(t *testing.T) {
	for line, want := range map[string]struct{ batch, debug, rebuild bool }{
		"fleet update a --batch --no-batch --debug --no-debug --no-rebuild": {},
		"--no-batch --debug fleet update a --batch --no-rebuild --rebuild":  {true, true, true},
		"cluster update-node a --rebuild --no-batch --batch":                {true, false, true},
		"cluster update-node a --batch 25% --no-batch --no-rebuild=false":   {false, false, true},
		"ssh-key remove --name k --batch --no-batch --debug":                {false, true, false},
		"cluster etcd --no-debug=false ctl get --batch --no-batch=false":    {true, true, false},
	} {
		a := &app{}
		root := a.root()
		args := strings.Fields(line)
		c, rest, err := root.Find(joinBatch(root, args))
		if err == nil {
			err = c.ParseFlags(rest)
		}
		rebuild, _ := c.Flags().GetBool("rebuild")
		if err != nil || a.batch != want.batch || a.debug != want.debug || rebuild != want.rebuild {
			t.Errorf("%s: batch %t, debug %t, rebuild %t, want %v; %v", line, a.batch, a.debug, rebuild, want, err)
		}
	}
}
