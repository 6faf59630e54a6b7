package rule

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

// tool has one of everything.
func tool() []Rule {
	return []Rule{
		{
			Name: "tool", Program: "tool", Role: protocol.Viewer, Defaults: []string{"--quiet", "-c4"},
			Options: slices.Concat(flags("-q --quiet", "-a", "-v"), value("[0-9]+", "-c --count"), many(value("[a-z=-]+", "-k --key")), optional(value("never|always", "--color -C")),
				loose(value("-?[0-9]+", "-b --boot")), []Option{{Names: []string{"--to"}, Value: "[a-z.]+", Not: `.*\.\..*`}}),
			Forms: []Form{
				words("show|list", operands(0, 2, "a name", "[a-z]+", "evil"), operands(0, 1, "a number", "[0-9]+", "")),
				words("get key", operands(1, 1, "a name", "[a-z]+", "")),
				{Words: []string{"wait"}, Options: value("[0-9]+", "-n")},
			},
			Denied: []Denied{denied("it runs other programs", "-x --exec run"), denied("it deletes", "drop")},
		},
		{Name: "tool write", Program: "tool", Role: protocol.Admin, Forms: []Form{words("set", operands(1, 1, "a name", "[a-z]+", ""))}},
		{Name: "seek", Program: "/opt/bin/seek", Role: protocol.Viewer, Style: Words, Options: slices.Concat(flags("-deep"), value("[a-z-]+", "-name")),
			Forms: []Form{{Operands: []Operand{operands(1, 1, "a path", "/.*", "")}}}, Denied: []Denied{denied("it runs other programs", "-exec")}},
	}
}

func TestMatch(t *testing.T) {
	for _, c := range []struct{ argv, want, says string }{
		{"tool show", "tool show --quiet -c4", ""},
		{"tool list a b 7", "tool list --quiet -c4 a b 7", ""},
		{"tool list 7", "tool list --quiet -c4 7", ""},
		{"tool list a 7 b", "", `"b" is one word too many`},
		{"tool list a b c", "", `"c": expected a number`},
		{"tool list A", "", `"A": expected a name, or a number`},
		{"tool list evil", "", `"evil": expected a name, or a number`},
		{"tool -qav list", "tool -q -a -v list -c4", ""},
		{"tool list -avc7", "tool list --quiet -a -v -c7", ""},
		{"tool list -c 7", "tool list --quiet -c7", ""},
		{"tool list --count=7 --quiet", "tool list --count=7 --quiet", ""},
		{"tool list --count 7", "tool list --quiet --count=7", ""},
		{"tool list -k a -k=b --key=-c --key -d", "tool list --quiet -c4 -ka -k=b --key=-c --key=-d", ""},
		{"tool list --color -C --color=never", "", "option -C is given more than once"},
		{"tool list --color", "tool list --quiet -c4 --color", ""},
		{"tool list --color=never", "tool list --quiet -c4 --color=never", ""},
		{"tool list -Cnever", "tool list --quiet -c4 -Cnever", ""},
		{"tool list --color never", "tool list --quiet -c4 --color never", ""}, // a name, as the program itself has it
		{"tool list -b -1", "tool list --quiet -c4 -b-1", ""},
		{"tool list --boot 7", "tool list --quiet -c4 --boot=7", ""},
		{"tool list -b a", "tool list --quiet -c4 -b a", ""},
		{"tool wait -n 5", "tool wait --quiet -c4 -n5", ""},
		{"tool get key a", "tool get key --quiet -c4 a", ""},

		{"tool", "", "a subcommand is missing: show, list, get, wait"},
		{"tool get", "", "a subcommand is missing: key"},
		{"tool get key", "", "missing: a name"},
		{"tool sho", "", `"sho" is none of: show, list, get, wait`},
		{"tool run x", "", `"run" is refused: it runs other programs`},
		{"tool list -n 5", "", `there is no option "-n"`},
		{"tool list -ax", "", `option "-x" is refused: it runs other programs`},
		{"tool list --exec=ls", "", `option "--exec" is refused: it runs other programs`},
		{"tool list --exe=ls", "", `there is no option "--exe"`},
		{"tool list --cou 5", "", `there is no option "--cou"; none is abbreviated: --count?`},
		{"tool list -c", "", "option -c has no value"},
		{"tool list -c 7 -c 8", "", "option -c is given more than once"},
		{"tool list --count=", "", `option --count: "" does not fit [0-9]+`},
		{"tool list --quiet=1", "", "option --quiet has no value"},
		{"tool list -c 7x", "", `option -c: "7x" does not fit [0-9]+`},
		{"tool list --to a..b", "", `option --to: the rule keeps "a..b" out`},
		{"tool list -", "", `"-" would be standard input`},
		{"tool list -- a", "", `"--" has no use`},
		{"tool list drop", "tool list --quiet -c4 drop", ""}, // a name, here
		{"/bin/tool list", "", `rule "tool" has tool without a folder`},
		{"seek /a", "", `no rule allows "seek"`},
		{"/opt/bin/seek /a -name -deep -deep", "/opt/bin/seek /a -name -deep -deep", ""},
		{"/opt/bin/seek /a -name", "", "option -name has no value"},
		{"/opt/bin/seek /a -name=b", "", `there is no option "-name=b"`},
		{"/opt/bin/seek /a -exec rm", "", `option "-exec" is refused: it runs other programs`},
		{"/opt/bin/seek /a --deep", "", `there is no option "--deep"`},
		{"/opt/bin/seek -deep", "", "missing: a path"},
		{"nothing", "", `no rule allows "nothing": the node's policy can add one`},
		{"bash -c id", "", `no rule allows "bash": a shell runs anything`},
		{"/bin/bash -c id", "", `no rule allows "/bin/bash": a shell runs anything`},
	} {
		allowed, err := Match(tool(), strings.Fields(c.argv), protocol.Viewer)
		switch {
		case c.says == "" && err != nil:
			t.Errorf("%s: %v", c.argv, err)
		case c.says == "" && strings.Join(allowed.Argv, " ") != c.want:
			t.Errorf("%s: %q", c.argv, allowed.Argv)
		case c.says != "" && (!errors.Is(err, &protocol.Refusal{Code: protocol.Denied}) || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s: %v", c.argv, err)
		}
	}
}

func TestRoleIsWhatIsMissing(t *testing.T) {
	argv := []string{"tool", "set", "a"}
	_, err := Match(tool(), argv, protocol.Deployer)
	if !errors.Is(err, &protocol.Refusal{Code: protocol.OverRole}) || !strings.Contains(err.Error(), `rule "tool write" needs the role admin, you are deployer`) {
		t.Error(err)
	}
	if allowed, err := Match(tool(), argv, protocol.Admin); err != nil || allowed.Rule.Name != "tool write" {
		t.Error(allowed, err)
	}
	own := Rule{Name: "own", Program: "tool", Role: protocol.Operator, Forms: []Form{words("set", operands(1, 1, "a name", "[a-z]+", ""))}}
	if allowed, err := Match(append([]Rule{own}, tool()...), argv, protocol.Operator); err != nil || allowed.Rule.Name != "own" {
		t.Errorf("a rule in front does not loosen: %v, %v", allowed, err)
	}
	if _, err := Match(append(tool(), own), argv, protocol.Viewer); err == nil || !strings.Contains(err.Error(), "operator") {
		t.Errorf("the lowest role that would do is not the one that is named: %v", err)
	}
}

// A rule that nobody validated allows nothing where its pattern is none, or would leave its anchors.
func TestPatternsAreWhole(t *testing.T) {
	for _, pattern := range []string{"a)|(b", "(", "a|b", "(?m)a$", "a"} {
		r := Rule{Program: "tool", Role: protocol.Viewer, Forms: []Form{{Operands: []Operand{operands(0, 1, "a name", pattern, "")}}}}
		for _, hostile := range []string{"ab", "xb", "ax", "aa", " a"} {
			if _, err := Match([]Rule{r}, []string{"tool", hostile}, protocol.Admin); err == nil {
				t.Errorf("pattern %s takes %q", pattern, hostile)
			}
		}
	}
}

func FuzzMatch(f *testing.F) {
	add := func(words ...string) {
		text, err := json.Marshal(words)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text))
	}
	add("tool", "list", "-qavc7", "--key", "-d", "a", "b", "7")
	add("tool", "list", "-b", "-1", "--color=never")
	add("/opt/bin/seek", "/a", "-name", "-deep")
	add("journalctl", "-fu", "nginx", "-b", "-1", "_PID=1")
	add("find", "/etc", "-name", "*.conf", "(", "-type", "f", ")")
	add("etcdctl", "put", "/cluster/a", "b")
	add("grep", "-e", "-x", "/etc/hosts")
	add("ip", "-br", "addr", "show", "dev", "eth0")
	rules := append(Default(), tool()...)
	f.Fuzz(func(t *testing.T, text string) {
		var argv []string
		if json.Unmarshal([]byte(text), &argv) != nil {
			argv = strings.Split(text, " ")
		}
		allowed, err := Match(rules, argv, protocol.Admin)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n\x1b\x00") {
				t.Fatalf("%q: the refusal is not one line: %q", argv, err)
			}
			return
		}
		checkAllowed(t, allowed)
		again, err := Match(rules, allowed.Argv, protocol.Admin)
		if err != nil || again.Rule.Name != allowed.Rule.Name || !slices.Equal(again.Argv, allowed.Argv) {
			t.Fatalf("%q is written as %q, which is read as %v, %v", argv, allowed.Argv, again, err)
		}
	})
}

// checkAllowed goes through what is run once more, in a simpler way than Match: every argument is an option that the rule
// spells out, whose value fits, or an operand without a dash in front.
func checkAllowed(t *testing.T, allowed *Allowed) {
	t.Helper()
	r := allowed.Rule
	if allowed.Argv[0] != r.Program {
		t.Fatalf("runs %q, not %s", allowed.Argv, r.Program)
	}
	options := slices.Clone(r.Options)
	for _, f := range r.Forms {
		options = append(options, f.Options...)
	}
	for i := 1; i < len(allowed.Argv); i++ {
		arg := allowed.Argv[i]
		if !strings.HasPrefix(arg, "-") {
			continue
		}
		known := false
		for _, o := range options {
			for _, n := range o.Names {
				value, joined := strings.CutPrefix(arg, n)
				if joined && strings.HasPrefix(n, "--") && value != "" {
					value, joined = strings.CutPrefix(value, "=")
				}
				switch re, _ := compile(o.Value); {
				case arg == n && r.Style == Words && o.Value != "" && !known:
					known = i+1 < len(allowed.Argv) && re.MatchString(allowed.Argv[i+1])
					i++
				case arg == n && (o.Value == "" || o.Optional):
					known = true
				case joined && r.Style == GNU && o.Value != "" && re.MatchString(value):
					known = true
				}
			}
		}
		if !known {
			t.Fatalf("%q of %q is no option of rule %s", arg, allowed.Argv, r.Name)
		}
	}
}
