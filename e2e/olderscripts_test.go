//go:build linux

package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/testos"
)

// wrapper is a script in the shape of those that fleets of the earlier tool are run by: it sources .env, exports nothing of it, and
// calls the group's commands.
const wrapper = `#!/usr/bin/env bash
WORK_DIR=$(dirname "$(readlink -f "$0")")
[ -f "$WORK_DIR/old.env" ] && . "$WORK_DIR/old.env"
fleet() { local verb=$1; shift; "$NIX_INFRA" fleet "$verb" -d "$WORK_DIR" --env="$WORK_DIR/old.env" "$@"; }
cmd="$1"; shift
case "$cmd" in
  init) "$NIX_INFRA" init -d "$WORK_DIR" --env="$WORK_DIR/old.env" --no-cert-auth --batch ;;
  update)
    fleet update --batch --nixos-version="$NIXOS_VERSION" --target="$*" --node-module="$NODE_MODULE" --no-rebuild
    fleet deploy-apps --batch --no-rebuild --target="$*"
    fleet cmd --target="$*" "nixos-rebuild switch --fast" ;;
  test)
    fleet deploy-apps --batch --debug --test-dir="$WORK_DIR/__test__/$1" --target="$2"
    fleet cmd --target="$2" "nixos-rebuild switch --fast"
    fleet cmd --target="$2" "systemctl is-active hello" ;;
  reset) fleet deploy-apps --batch --target="$1" ;;
  rollback) fleet cmd --target="$1" "nixos-rebuild switch --rollback" ;;
  cmd) fleet cmd --target="$1" "$2" ;;
esac
`

// TestOlderScripts runs a fleet by such a script, from end to end: what it leaves on the nodes is what its words say.
func TestOlderScripts(t *testing.T) {
	f := shared(t)
	n1, n2 := f.nodes["n1"], f.nodes["n2"]
	settings, err := os.ReadFile(filepath.Join(f.project, "nix-infra.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.write("nix-infra.yaml", string(settings))
		for _, path := range []string{"fleetcli", "old.env", "__test__", "node_types/older.nix"} {
			os.RemoveAll(filepath.Join(f.project, path))
		}
	})
	f.write("fleetcli", wrapper)
	f.write("old.env", "SECRETS_PWD='"+password+"'\nNIXOS_VERSION="+testos.DefaultVersion+"\nNODE_MODULE=node_types/older.nix\n")
	f.write("node_types/older.nix", `{ ... }: { etc."testos/node-type".text = "older\n"; }`)
	for _, n := range []string{"n1", "n2"} {
		f.write("nodes/"+n+".nix", service("of "+n, ""))
	}
	f.write("__test__/hello/nodes/n1.nix", service("under test", ""))
	script := func(args ...string) result {
		t.Helper()
		cmd := f.lab.Command(f.ctx, append([]string{"bash", filepath.Join(f.project, "fleetcli")}, args...)...)
		cmd.Env = append(os.Environ(), "NIX_INFRA="+filepath.Join(programs.dir, "nix-infra"), "HOME="+f.project, "NO_COLOR=1", "NIX_INFRA_CREDS="+f.creds)
		var out, errOut bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errOut
		if err := cmd.Run(); err != nil {
			t.Fatalf("%q: %v\n%s%s", args, err, &out, &errOut)
		}
		return result{0, out.String(), errOut.String()}
	}
	says := func(when, want string) {
		t.Helper()
		if got := f.exec(n1, "systemctl", "show", "-P", "Description", "hello.service"); got != "says "+want {
			t.Errorf("%s, n1 %q, want %q", when, got, want)
		}
	}

	if r := script("init"); strings.Contains(r.out, "made") {
		t.Errorf("init made something in a project: %s", r)
	}
	r := script("update", "n1", "n2")
	if !strings.Contains(r.errOut, "nixos-rebuild switch is nix-infra deploy here") {
		t.Errorf("update does not say what it does: %s", r)
	}
	for _, n := range []string{f.exec(n1, "cat", "/etc/testos/node-type"), f.exec(n2, "cat", "/etc/testos/node-type")} {
		if n != "older" {
			t.Errorf("a node is of type %q", n)
		}
	}
	says("after an update", "of n1")
	deployed := f.status()["n1"].Deployment

	if r := script("test", "hello", "n1"); !strings.HasSuffix(r.out, "\nactive\n") {
		t.Errorf("is-active: %s", r)
	}
	says("in a test, and after one more rebuild", "under test")
	if s := f.status()["n1"]; s.State != "confirmed" || s.Deployment == deployed {
		t.Errorf("n1 after two more deployments: %+v", s)
	}
	script("reset", "n1")
	says("after the test", "of n1")
	script("rollback", "n1")
	says("after the way back", "under test")
	if r := script("cmd", "n1  n2", "uname -s"); r.out != "n1: Linux\nn2: Linux\n" && r.out != "n2: Linux\nn1: Linux\n" {
		t.Errorf("cmd of two: %s", r)
	}
}

// TestDoctor: with nothing wrong but what the lab is, it says so of every part; a unit that fails is found.
func TestDoctor(t *testing.T) {
	f := shared(t)
	f.write("nodes/n1.nix", service("well", ""))
	f.write("nodes/n2.nix", service("well", ""))
	f.must("deploy", "n1", "n2", "--timeout", "60s", "--settle", "1s")
	type symptom struct{ Area, About, Check, Level, What, Do string }
	look := func() (all []symptom, code int) {
		t.Helper()
		r := f.cli("doctor", "n1", "n2", "--json")
		for line := range strings.Lines(r.out) {
			var s symptom
			if err := json.Unmarshal([]byte(line), &s); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			all = append(all, s)
		}
		return all, r.code
	}
	f.exec(f.nodes["n1"], "systemctl", "reset-failed")
	want := map[string]bool{"reachable": true, "certificate": true, "version": true, "clock": true, "etcd": true, "record": true, "online": true, "deployment": true, "units": true, "policy": true, "placeholders": true}
	f.eventually(soon, func() string { // the beat of before may still be what is known
		all, _ := look()
		fine := map[string]bool{}
		for _, s := range all {
			if s.Level == "ok" {
				fine[s.Check] = true
			} else if want[s.Check] {
				return s.Area + " " + s.About + ": " + s.What
			}
		}
		for check := range want {
			if !fine[check] {
				return "nothing is said of " + check
			}
		}
		return ""
	})
	f.exec(f.nodes["n1"], "sh", "-c", "systemd-run --wait --unit=doctor-test --property=CollectMode=inactive false || true")
	defer f.exec(f.nodes["n1"], "systemctl", "reset-failed")
	f.eventually(soon, func() string {
		all, code := look()
		for _, s := range all {
			if s.Level == "problem" && s.About == "n1" && s.Check == "units" && strings.Contains(s.What, "doctor-test.service") && s.Do != "" && code == 1 {
				return ""
			}
		}
		return "it does not find the unit that failed"
	})
}
