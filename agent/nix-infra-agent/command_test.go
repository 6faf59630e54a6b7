package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
)

// run is the program with a command line.
func run(t *testing.T, in []byte, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	c := command(bytes.NewReader(in), &out, &out)
	c.SetArgs(args)
	err := c.ExecuteContext(t.Context())
	if err != nil && strings.Contains(err.Error(), "\n") {
		t.Errorf("%v: an error of more than one line: %v", args, err)
	}
	return out.String(), err
}

func TestFromMachineToNode(t *testing.T) {
	f := testfleet.New(t)
	dir := filepath.Join(t.TempDir(), "agent")
	for _, args := range [][]string{{"run"}, {"status"}, {}} {
		if _, err := run(t, nil, append(args, "--dir", dir)...); err == nil || !strings.Contains(err.Error(), "request --name") {
			t.Errorf("%v before the enrolment: %v", args, err)
		}
	}
	first, err := run(t, nil, "request", "--name", "web-1", "--dir", dir)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "request.json")
	if out, err := run(t, nil, "request", "--name", "web-1", "--out", file, "--dir", dir); err != nil || out != "" {
		t.Fatal(out, err)
	}
	second, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var r, again protocol.EnrolRequest
	if strings.Count(first, "\n") != 1 || json.Unmarshal([]byte(first), &r) != nil || json.Unmarshal(second, &again) != nil {
		t.Fatalf("requests %s, %s", first, second)
	}
	if r.Key != again.Key || r.XKey != again.XKey || r.Validate() != nil {
		t.Fatal("the second request is about other keys")
	}
	answer := f.Answer(&r)
	for name, bad := range map[string][]byte{"nothing": nil, "text": []byte("no\nanswer"), "too long": make([]byte, maxAnswer+1), "half": answer[:len(answer)/2]} {
		if _, err := run(t, bad, "load", "-", "--dir", dir); err == nil {
			t.Errorf("%s was loaded", name)
		}
	}
	if out, err := run(t, answer, "load", "--dir", dir); err != nil || !strings.Contains(out, "systemctl") || !strings.Contains(out, "web-1") {
		t.Fatal(out, err)
	}
	out, err := run(t, nil, "status", "--json", "--dir", dir)
	var s agent.Status
	if err != nil || json.Unmarshal([]byte(out), &s) != nil || s.Node != "web-1" || s.Running || s.Operator != f.Public.Operator {
		t.Fatal(out, err)
	}
	if out, err := run(t, nil, "status", "--dir", dir); err != nil || !strings.Contains(out, "nothing was deployed") {
		t.Fatal(out, err)
	}
}

func TestBadCommandLines(t *testing.T) {
	for _, args := range [][]string{{"frobnicate"}, {"request", "--dir", t.TempDir()}, {"request", "--name", "Bad Name", "--dir", t.TempDir()}, {"load", "/no/such/file", "--dir", t.TempDir()}, {"status", "--nope"}} {
		if _, err := run(t, nil, args...); err == nil {
			t.Errorf("%v was taken", args)
		}
	}
}
