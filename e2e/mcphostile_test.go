//go:build linux

package e2e

import (
	"encoding/json"
	"os"
	"strings"
	"time"
)

// hostileAssistant: an assistant that was talked into all sorts of things has nothing run on a node. That is not taken from the
// answers: the kernel has a list of all that ran. The whole table is held against a node that is not real in cli/command.
func (f *fleet) hostileAssistant() {
	t, node := f.t, f.nodes["n2"]
	f.eventually(time.Minute, func() string {
		if state := f.property(node, "user@0.service", "ActiveState"); state != "inactive" {
			return "root's session is " + state
		}
		return ""
	})
	f.exec(node, "systemctl", "stop", "systemd-tmpfiles-clean.timer")
	f.exec(node, "rm", "-rf", "/tmp/x")
	a := f.overStdio("accept", "cluster")
	list := f.account(node)
	// control runs something that is allowed, and gives how long the list is then.
	control := func() int {
		t.Helper()
		before := len(list.all())
		a.good("remote-command", in{"target": "n2", "command": "uname -r"})
		ran := false
		for _, p := range list.all()[before:] {
			ran = ran || p.comm == "uname"
		}
		if !ran {
			t.Fatalf("uname ran, and is not on the list: %v", list.all()[before:])
		}
		f.eventually(time.Minute, func() string {
			if n := len(list.all()); n != before {
				before = n
				return "the node still works on what was allowed"
			}
			return ""
		})
		return before
	}
	before := control()
	calls := 0
	ask := func(tool string, inputs any) {
		t.Helper()
		if calls++; !a.call(tool, inputs).failed {
			t.Errorf("%s %s was done", tool, inputs)
		}
	}
	data, err := os.ReadFile("../cli/mcp/testdata/hostile.txt")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		tool, inputs, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok || tool == "#" || strings.Contains(tool, "test-") || strings.Contains(tool, "nix-") || tool == "search" || tool == "edit-app-module-files" || tool == "read-project-files" {
			continue
		}
		ask(tool, json.RawMessage(strings.ReplaceAll(inputs, "{NODE}", "n2")))
	}
	for i, h := range hostileLines(t) {
		if i%4 == 0 && !h.words && !strings.Contains(h.text, "|") { // what is behind a pipe is the server's own
			ask("remote-command", in{"target": "n2", "command": h.text})
		}
	}
	if calls < 300 {
		t.Errorf("only %d hostile calls", calls)
	}
	for _, p := range list.all()[before:] {
		t.Errorf("on n2 ran %q, pid %d, a child of %d", p.comm, p.pid, p.parent)
	}
	if _, err := node.ReadFile("/tmp/x"); err == nil {
		t.Error("/tmp/x was made on n2")
	}
	if _, err := os.Stat("/tmp/x"); err == nil {
		t.Error("/tmp/x was made here")
	}
	control()
	t.Logf("%d hostile calls", calls)
}
