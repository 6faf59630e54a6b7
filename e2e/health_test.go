//go:build linux

package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// declared is a configuration with a check of each kind; change replaces text in it.
func declared(message string, change ...string) string {
	return fmt.Sprintf(`{ testos, ... }:
let
  # A server as inetd had them: it reads the request's head and answers.
  web = testos.writeScript "web" ''
    while read -r line && [ "''${line%%?}" ]; do :; done
    printf 'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\npong\n'
  '';
in
{
  infrastructure.hello = { enable = true; message = "%s"; };
  units."web.socket".socket = { ListenStream = "127.0.0.1:8080"; Accept = true; };
  units."web@.service".service = { ExecStart = "-${web}"; StandardInput = "socket"; StandardOutput = "socket"; };
  etc."nix-infra/health.json".text = builtins.toJSON {
    v = 1;
    checks = map (check: { interval = 1; timeout = 2; grace = 3; } // check) [
      %s
    ];
  };
}
`, message, strings.NewReplacer(change...).Replace(checks))
}

const checks = `{ name = "says-pong"; kind = "http"; url = "http://127.0.0.1:8080/ping"; status = 200; body = "pong"; }
      { name = "listens"; kind = "tcp"; address = "127.0.0.1:8080"; }
      { name = "runs"; kind = "unit"; unit = "hello.service"; }
      { name = "agrees"; kind = "command"; command = [ "/bin/sh" "-c" "test -S /run/dbus/system_bus_socket" ]; }
      { name = "is-there"; kind = "file"; path = "/etc/testos/node"; contains = "[%%localhost.hostname%%]"; }`

// TestHealthChecks: what a node's own configuration declares decides whether a system holds: each kind, passing and
// failing.
func TestHealthChecks(t *testing.T) {
	f := newFleet(t, "n1")
	node := f.nodes["n1"]
	f.write("nodes/n1.nix", declared("healthy"))
	f.must("deploy", "n1", "--timeout", "60s", "--settle", "1s")
	old := f.running(node)
	show := f.must("deployment", "show", f.status()["n1"].Deployment, "--json").out
	for _, name := range []string{"says-pong", "listens", "runs", "agrees", "is-there"} {
		if !strings.Contains(show, `"name":"`+name+`"`) {
			t.Errorf("the record lacks the check %s: %s", name, show)
		}
	}
	if strings.Contains(show, `"passed":false`) {
		t.Errorf("a check failed: %s", show)
	}
	if out := f.exec(node, "bash", "-c", `exec 3<>/dev/tcp/127.0.0.1/8080; printf 'GET / HTTP/1.0\r\n\r\n' >&3; cat <&3`); !strings.HasSuffix(out, "pong") {
		t.Errorf("the server that is checked says %q", out)
	}

	for name, change := range map[string][]string{
		"says-pong": {`"pong"`, `"ping"`},
		"listens":   {`address = "127.0.0.1:8080"`, `address = "127.0.0.1:8081"`},
		"runs":      {`"hello.service"`, `"goodbye.service"`},
		"agrees":    {`test -S`, `test -d`},
		"is-there":  {`"/etc/testos/node"`, `"/etc/testos/nowhere"`},
	} {
		f.write("nodes/n1.nix", declared("not "+name, change...))
		r := f.cli(f.deployArgs("n1")...)
		if r.code != 1 || !strings.Contains(r.out+r.errOut, name) {
			t.Errorf("a deploy whose check %s fails: %v", name, r)
		}
		if s := f.isBack(node, old); !strings.Contains(s.Reason, name) {
			t.Errorf("the reason does not name the check %s: %q", name, s.Reason)
		}
		show := f.must("deployment", "show", f.status()["n1"].Deployment, "--json").out
		if strings.Count(show, `"passed":false`) != 1 || !strings.Contains(show, `"passed":true`) {
			t.Errorf("%s alone should have failed: %s", name, show)
		}
	}

	// What can't be understood is refused while the old system still runs: no process is touched.
	pid := f.mainPID(node)
	f.write("nodes/n1.nix", declared("unknown", `"unit"`, `"horoscope"`))
	if r := f.cli(f.deployArgs("n1")...); r.code != 1 || !strings.Contains(r.out+r.errOut, "horoscope") {
		t.Errorf("a deploy with a check that nobody knows: %v", r)
	}
	if s := f.status()["n1"]; s.State != "failed" || f.running(node) != old || f.mainPID(node) != pid {
		t.Errorf("%+v; runs %s", s, f.running(node))
	}
}
