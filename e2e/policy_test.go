//go:build linux

package e2e

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/rule"
)

// hostileLine is a line of protocol/rule/testdata/hostile.txt: a command that no node runs by its default policy.
type hostileLine struct {
	text  string
	words bool     // the text is the words themselves, as JSON; else the CLI takes it apart
	argv  []string // nil: only a shell could carry it out
}

func hostileLines(t *testing.T) []hostileLine {
	t.Helper()
	data, err := os.ReadFile("../protocol/rule/testdata/hostile.txt")
	if err != nil {
		t.Fatal(err)
	}
	var all []hostileLine
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" || line[0] == '#' {
			continue
		}
		h := hostileLine{text: line, words: strings.HasPrefix(line, `["`)}
		if h.words {
			if err := json.Unmarshal([]byte(line), &h.argv); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
		} else if h.argv, err = rule.Split(line); err != nil {
			h.argv = nil
		}
		all = append(all, h)
	}
	return all
}

// TestPolicyRefuses: what the policy of a node doesn't allow isn't run there, whoever asks for it and by whatever way.
// That is not taken from the answers: the kernel has a list of all that ran.
func TestPolicyRefuses(t *testing.T) {
	f := shared(t)
	node := f.nodes["n1"]
	lines := hostileLines(t)
	if len(lines) < 200 {
		t.Fatalf("only %d hostile command lines", len(lines))
	}
	// What a node does by itself now and then would be on the list, too; at first that is the end of the enrolment.
	f.eventually(soon, func() string {
		if state := f.property(node, "user@0.service", "ActiveState"); state != "inactive" {
			return "root's session is " + state
		}
		return ""
	})
	f.exec(node, "systemctl", "stop", "systemd-tmpfiles-clean.timer")
	t.Cleanup(func() { f.exec(node, "systemctl", "start", "systemd-tmpfiles-clean.timer") })
	f.exec(node, "rm", "-rf", "/tmp/x")
	started := func() int {
		t.Helper()
		f.exec(node, "journalctl", "--sync")
		log := f.exec(node, "journalctl", "-b", "-o", "cat", "--no-pager", "_PID=1")
		return strings.Count(log, "Started nix-infra-run-")
	}
	units := started()
	list := f.account(node)
	// control runs something that is allowed, and gives how long the list is then.
	control := func() int {
		t.Helper()
		before := len(list.all())
		f.must("exec", "n1", "--", "uname", "-r")
		ran := false
		for _, p := range list.all()[before:] {
			ran = ran || p.comm == "uname"
		}
		if !ran {
			t.Fatalf("uname ran, and is not on the list: %v", list.all()[before:])
		}
		f.eventually(soon, func() string { // systemd has what to do after the end of a unit
			if n := len(list.all()); n != before {
				before = n
				return "the node still works on what was allowed"
			}
			return ""
		})
		return before
	}
	before := control()

	for _, role := range []protocol.Role{protocol.Viewer, protocol.Operator, protocol.Admin} {
		name := "h" + string(role)
		who := f.user(f.keys(), name, role, time.Time{})
		r := f.raw(who, "ni.v1.reply."+name)
		ask := func(line string, want protocol.Code, action protocol.Action, order any) {
			t.Helper()
			// By a subject that everybody may publish on: who is asked goes by the action.
			by := protocol.RequestSubject("n1", protocol.RunCommand)
			if got := f.carried(r, name, signed(t, who, action, "n1", order), "n1", by); got != want {
				t.Errorf("%s for a %s: answered %q, want %q", line, role, got, want)
			}
		}
		for _, h := range lines {
			order := protocol.CommandOrder{Argv: h.argv}
			switch {
			case h.argv == nil && role != protocol.Admin:
				ask(h.text, protocol.OverRole, protocol.RunShell, protocol.ShellOrder{Text: h.text})
			case h.argv == nil:
				ask(h.text, protocol.Denied, protocol.RunShell, protocol.ShellOrder{Text: h.text})
			case order.Validate() != nil: // a NUL, or no program at all
				ask(h.text, protocol.Malformed, protocol.RunCommand, order)
			default:
				ask(h.text, protocol.Denied, protocol.RunCommand, order)
			}
		}
	}
	// The CLI is no other way. What stands behind a pipe would run here, so that those are left out.
	for i, h := range lines {
		if i%15 != 0 || !h.words && strings.Contains(h.text, "|") || strings.Contains(strings.Join(h.argv, ""), "\x00") {
			continue
		}
		args := []string{"cmd", "--target=n1", "--", h.text}
		if h.words {
			args = append([]string{"exec", "n1", "--"}, h.argv...)
		}
		if got := f.cli(args...); got.code != 2 || got.out != "" {
			t.Errorf("%s: %v", h.text, got)
		}
	}

	for _, p := range list.all()[before:] {
		t.Errorf("on n1 ran %q, pid %d, a child of %d", p.comm, p.pid, p.parent)
	}
	if _, err := node.ReadFile("/tmp/x"); err == nil {
		t.Error("/tmp/x was made")
	}
	control()
	if n := started() - units; n != 2 {
		t.Errorf("%d units were started to run something, and two were allowed", n)
	}
}
