package project

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
)

func TestFill(t *testing.T) {
	p := openFixture(t, filepath.Join("testdata", "fm"))
	r := TreeRequest{Node: "node001", Nodes: []NodeFacts{{Name: "node001", IPv4: "192.0.2.1"}, {Name: "db1", IPv4: "192.0.2.2", OverlayIP: "10.10.3.0"}}}
	secrets := map[string]string{"db.password": `p"$(x)'[%%localhost.ipv4%%]`}
	read := func(name string) (string, error) {
		if value, ok := secrets[name]; ok {
			return value, nil
		}
		return "", errors.New("there is no secret " + name)
	}
	got, err := p.Fill(r, "[%%localhost.hostname%%]@[%%db1.ipv4%%],[%%db1.overlayIp%%]:[%%secrets/db.password%%] $x", read)
	if want := "node001@192.0.2.2,10.10.3.0:" + secrets["db.password"] + " $x"; err != nil || got != want {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
	p.Settings.Nodes = map[string]NodeSettings{"db1": {OverlayIP: "10.10.9.0"}} // what the owner wrote counts more
	if got, err := p.Fill(r, "[%%db1.overlayIp%%]", nil); err != nil || got != "10.10.9.0" {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := p.Fill(r, "as it is", nil); err != nil || got != "as it is" {
		t.Errorf("%q, %v", got, err)
	}
	_, err = p.Fill(r, "[%%secrets/none%%] [%%dp1.ipv4%%] [%%localhost.overlayIp%%] [%%nodeName%%]", read)
	failsWith(t, err, "[%%secrets/none%%]: there is no secret none", "[%%dp1.ipv4%%]: no node dp1 is known; did you mean db1?",
		"the overlay address of node001 is not known", "[%%nodeName%%]: it is filled in in configuration.nix and flake.nix only")
	_, err = p.Fill(r, "[%%pre-build-secrets/x%%]", nil)
	failsWith(t, err, "no secret is filled in here")
	if _, err := p.Fill(TreeRequest{Node: "No_Name"}, "", nil); err == nil {
		t.Error("a node of a bad name")
	}
}

func TestAction(t *testing.T) {
	p := small(t, map[string]string{"app_modules/mongodb/action.sh": "echo\n", "app_modules/other/default.nix": "{ }\n", "action.sh": "no\n"})
	if script, err := p.Action("mongodb"); err != nil || string(script) != "echo\n" {
		t.Errorf("%q, %v", script, err)
	}
	for module, says := range map[string]string{
		"mongo": "app_modules/mongo/action.sh in the project; the modules with an action: mongodb", "mongodv": "did you mean mongodb?", "other": "there is no app_modules/other/action.sh",
		"..": "is no app module", "": "is no app module", "a/../..": "is no app module",
	} {
		if _, err := p.Action(module); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", module, err)
		}
	}
}
