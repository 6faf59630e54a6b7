package command

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	mcpgo "github.com/mark3labs/mcp-go/mcp"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	mcpfleet "github.com/nix-infra/nix-infra/cli/mcp/fleet"
	"github.com/nix-infra/nix-infra/protocol"
)

func TestMCPActs(t *testing.T) {
	s, f, viewer := mcpFleet(t)
	f.Add("web1")
	f.Add("web2")
	deployer := s.path("deployer.creds")
	s.must("access", "add", "dora", "--role", "deployer", "--out", deployer)
	listed := func(a *assistant) (names []string) {
		list, err := a.client.ListTools(t.Context(), mcpgo.ListToolsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, tool := range list.Tools {
			if !*tool.Annotations.ReadOnlyHint {
				names = append(names, tool.Name)
			}
		}
		return names
	}
	// A viewer has none of them, however much is allowed.
	if got := listed(s.assistant(viewer, &person{}, mcpfleet.Allowable...)); len(got) > 0 {
		t.Errorf("a viewer has %v", got)
	}
	if got := listed(s.assistant(deployer, &person{}, "deploy", "restart-unit")); fmt.Sprint(got) != "[deploy restart-unit]" {
		t.Errorf("a deployer has %v", got)
	}
	deployments := func() int { return len(f.Deployments()) }

	no := &person{says: mcpgo.ElicitationResponseActionDecline}
	s.assistant(deployer, no, "deploy").refused("deploy", in{"target": "web1"}, "not confirmed")
	if !strings.Contains(no.asked, "1 node (web1)") || !strings.Contains(no.asked, "as dora (deployer)") || deployments() != 0 {
		t.Errorf("asked %q; %d deployments", no.asked, deployments())
	}
	s.assistant(deployer, nil, "deploy").refused("deploy", in{"target": "web1"}, "a person has to confirm it")

	yes := &person{says: mcpgo.ElicitationResponseActionAccept}
	a := s.assistant(deployer, yes, mcpfleet.Allowable...)
	// acts does something, and waits until the nodes have done it: what is asked about nodes that are at something is soon no more as it was.
	acts := func(tool string, inputs in, says ...string) {
		t.Helper()
		a.must(tool, inputs, says...)
		settled(t, f)
	}
	acts("deploy", in{"target": "web*", "canary": "1"}, `"event":"deployment"`)
	if d := f.Deployments(); len(d) != 1 || d[0].By != "dora" || d[0].Strategy.Canary != "1" {
		t.Errorf("%+v", d)
	}
	s.write("configuration.nix", "{ changed = true; }\n")
	acts("deploy", in{"target": "web1"})
	if !strings.Contains(yes.asked, "would change 1 file") || !strings.Contains(yes.asked, "configuration.nix") {
		t.Errorf("asked %q", yes.asked)
	}
	acts("rollback", in{"target": "web1"})
	acts("reboot", in{"target": "web2"})
	if deployments() != 4 {
		t.Errorf("%d deployments", deployments())
	}
	for _, target := range []string{"--out=x", "web1 --mode=test", ""} {
		if got := a.call("deploy", in{"target": target}); !got.failed {
			t.Errorf("the target %q was taken: %s", target, got.text)
		}
	}
	r := newRunner(f.Add("web3"), func([]string, func(protocol.Output), <-chan struct{}) (*protocol.Ending, error) {
		return &protocol.Ending{Result: protocol.ResultSuccess}, nil
	})
	a.must("restart-unit", in{"target": "web3", "units": "nginx"})
	if asked := r.last(); asked != `exec {"argv":["systemctl","restart","nginx"],"timeout":120,"role":"operator"}` {
		t.Errorf("asked %s", asked)
	}
	a.refused("action", in{"target": "web3", "module": "--cmd", "words": "status"}, "there is no app_modules/--cmd/action.sh")
	a.refused("action", in{"target": "web3", "module": "db", "words": "status; id"}, "there is no shell here")
}

// settled waits until all deployments have ended.
func settled(t *testing.T, f *fleettest.Fleet) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		going := slices.DeleteFunc(f.Deployments(), func(d protocol.Deployment) bool { return d.Rollout.State.Ended() })
		if len(going) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("a deployment does not end: %+v", going[0])
		}
	}
}

// What was shown is what is done: where the project or the fleet became another one before the answer, nothing is.
func TestMCPActsOnWhatWasShown(t *testing.T) {
	s, f, _ := mcpFleet(t)
	f.Add("web1")
	const closure = "/nix/store/0123456789abcdfghijklmnpqrsvwxyz-system"
	f.Change("web1", func(n *protocol.NodeState) { n.Beat.Closure = closure })
	s.write("configuration.nix", "{ a = 1; }\n")
	s.write("app_modules/db/action.sh", "echo one\n")
	s.pipe("one", "secrets", "store", "token")
	s.write("nodes/web1.nix", `{ a = "[%%secrets/token%%]"; }`)
	deployer := s.path("deployer.creds")
	s.must("access", "add", "dora", "--role", "deployer", "--out", deployer)
	yes := &person{says: mcpgo.ElicitationResponseActionAccept}
	a := s.assistant(deployer, yes, mcpfleet.Allowable...)
	deploy := in{"target": "web*"}
	const other = "the confirmation is for something else"
	for name, change := range map[string]func(){
		"a file":   func() { s.write("configuration.nix", s.read("configuration.nix")+"# more\n") },
		"a secret": func() { s.pipe("another", "secrets", "store", "token") },
		"a node":   func() { f.Add("web" + fmt.Sprint(len(f.Requests()))) },
	} {
		yes.meanwhile = change
		if got := a.call("deploy", deploy); !got.failed || !strings.Contains(got.text, other) {
			t.Errorf("%s changed before the answer: %s", name, got.text)
		}
	}
	yes.meanwhile = func() { s.write("app_modules/db/action.sh", "echo two\n") }
	a.refused("action", in{"target": "web1", "module": "db", "words": "status"}, other)
	if !strings.Contains(yes.asked, protocol.Digest([]byte("echo one\n"))) {
		t.Errorf("the person was asked %q", yes.asked)
	}
	yes.meanwhile = func() { f.Change("web1", func(n *protocol.NodeState) { n.Beat.Generation++ }) }
	for _, tool := range []string{"rollback", "reboot"} {
		a.refused(tool, in{"target": "web1"}, other)
	}
	if len(f.Deployments()) != 0 {
		t.Errorf("%d deployments", len(f.Deployments()))
	}
	s.expect(Refused, "is not what --expect says", "action", "web1", "--app-module", "db", "--expect", protocol.Digest([]byte("echo one\n")), "--cmd", "status")
	// The same holds for what becomes another one after the answer, before anything is done.
	yes.meanwhile = nil
	const late = "is not what --expect says"
	runs := func() { f.Change("web1", func(n *protocol.NodeState) { n.Beat.Closure += "-by-hand" }) }
	for tool, then := range map[string]func(){"deploy": func() { s.write("configuration.nix", "{ }\n") }, "action": func() { s.write("app_modules/db/action.sh", "echo three\n") }, "rollback": runs, "reboot": runs} {
		yes.then = then
		a.refused(tool, map[string]in{"deploy": deploy, "action": {"target": "web1", "module": "db", "words": "status"}, "rollback": {"target": "web1"}, "reboot": {"target": "web1"}}[tool], late)
	}
	yes.then = nil
	if len(f.Deployments()) != 0 {
		t.Errorf("%d deployments", len(f.Deployments()))
	}
	f.Change("web1", func(n *protocol.NodeState) { n.Beat.Closure = closure })
	f.Register("gone")
	for _, command := range []string{"rollback", "reboot"} {
		s.expect(Refused, "web1 runs "+closure+", which "+late, command, "web1", "--expect", closure+"-other")
		s.expect(Refused, "what gone runs is not known", command, "gone", "--expect", closure)
	}
	s.must("rollback", "web1", "--expect", closure+"-other,"+closure)
	s.must("reboot", "web1", "--expect", f.Record("web1").Beat.Closure)
	a.must("deploy", deploy)
}
