package command

import (
	"fmt"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/rule"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// TestOlderCalls makes the calls that the scripts around the earlier tool make, word by word.
func TestOlderCalls(t *testing.T) {
	s, f := withModule(t)
	s.write("old.env", "SECRETS_PASS='correct horse'\nSSH_KEY=nixinfra\n")
	delete(s.env, "SECRETS_PASS")
	runners := map[string]*runner{}
	for _, name := range []string{"web1", "web2"} {
		runners[name] = newRunner(f.Add(name), func(_ []string, send func(protocol.Output), _ <-chan struct{}) (*protocol.Ending, error) {
			send(protocol.Output{Stdout: []byte("out\n"), Stderr: []byte("err\n")})
			return success, nil
		})
	}
	actor(t, f, f.Add("db1"), shows)
	w, e := "-d="+s.dir, "--env=old.env"
	for _, c := range []struct {
		args []string
		out  string // of web1, or db1
		asks string // of web1; "" is not looked at
	}{
		// C9 and C24
		{[]string{"cluster", "cmd", "-d", s.dir, e, "--target=web1", "systemctl restart confd"}, "out\nerr\n", `exec {"argv":["systemctl","restart","confd"]}`},
		{[]string{"cmd", "-d", s.dir, e, "--target=web1", "nixos-rebuild switch --fast"}, "out\n", `exec {"argv":["nixos-rebuild","switch","--fast"]}`},
		{[]string{"cluster", "cmd", w, "--ssh-key=k", "--debug", e, "--target=web1 web2", "systemctl is-active etcd"}, "web1: out\nweb1: err\n", `exec {"argv":["systemctl","is-active","etcd"]}`},
		{[]string{"fleet", "cmd", "systemctl status nginx", "-d", s.dir, "--env", "old.env", "--target", "web1"}, "out\nerr\n", `exec {"argv":["systemctl","status","nginx"]}`},
		{[]string{"fleet", "-d", s.dir, "--env=old.env", "--ssh-key", "k", "cmd", "--target=web1", "a; b"}, "out\nerr\n", `shell {"text":"a; b"}`},
		{[]string{"fleet", "cmd", e, "--target=web1", "systemctl", "status", "nginx"}, "out\nerr\n", `exec {"argv":["systemctl","status","nginx"]}`},
		{[]string{"fleet", "cmd", e, "--target=web1", "--", "ls", "-l"}, "out\nerr\n", `exec {"argv":["ls","-l"]}`},
		{[]string{"cmd", e, "--target=web1", "cat x | wc -l"}, "1\n", `exec {"argv":["cat","x"]}`},
		// C11 and C24
		{[]string{"cluster", "action", "-d", s.dir, e, "--target=db1", "--app-module=mongodb", "--cmd=create-db --name=x", "--env-vars=A=1,B=[%%web1.ipv4%%]", "--batch"}, "[\"create-db\" \"--name=x\"] map[A:1 B:192.0.2.7]\nto stderr\n", ""},
		{[]string{"fleet", "action", w, e, "--ssh-key=k", "--target", "db1", "--app-module", "mongodb", "--cmd", "status"}, "[\"status\"] map[]\nto stderr\n", ""},
		{[]string{"cluster", "action", w, e, "--target=db1", "--app-module=mongodb", "--cmd=create", "--save-as-secret=s"}, "db1: what the action of mongodb printed is secret s now\n", ""},
		// C12, C13 and C14
		{[]string{"cluster", "etcd", "services", "-d", s.dir, e, "--target=web1 web2"}, "out\n", `exec {"argv":["etcdctl","get","--prefix","/cluster/services"]}`},
		{[]string{"cluster", "etcd", "--target=web1", "backends", w, e}, "out\n", `exec {"argv":["etcdctl","get","--prefix","/cluster/backends"]}`},
		{[]string{"cluster", "etcd", "frontends", e, "--ssh-key=k", "--target", "web1"}, "out\n", `exec {"argv":["etcdctl","get","--prefix","/cluster/frontends"]}`},
		{[]string{"etcd", "network", e, "--target=web1"}, "out\n", `exec {"argv":["etcdctl","get","--prefix","/coreos.com"]}`},
		{[]string{"etcd", "nodes", e, "--target=web1"}, "out\n", `exec {"argv":["etcdctl","get","--prefix","/cluster/nodes"]}`},
		{[]string{"cluster", "etcd", "ctl", "del --prefix /cluster/services", "-d", s.dir, e, "--target=web1"}, "out\n", `exec {"argv":["etcdctl","del","--prefix","/cluster/services"]}`},
		{[]string{"etcd", "ctl", e, "--target=web1", "--", "put", "/cluster/x", "a b"}, "out\n", `exec {"argv":["etcdctl","put","/cluster/x","a b"]}`},
		{[]string{"cluster", "etcd", "get --prefix /nodes", "-d", s.dir, e, "--target=web1"}, "out\n", `exec {"argv":["etcdctl","get","--prefix","/nodes"]}`},
		{[]string{"etcd", "get", "/cluster/x", e, "--target=web1,web2", "--prefix=always"}, "web1: out\n", `exec {"argv":["etcdctl","get","/cluster/x"]}`},
	} {
		r := s.run(c.args...)
		if r.status != OK || !strings.Contains(r.out, c.out) || !strings.Contains(c.out, ": ") && r.out != c.out {
			t.Errorf("%q: %+v, want %q", c.args, r, c.out)
		}
		if got := runners["web1"].last(); c.asks != "" && got != c.asks {
			t.Errorf("%q: asked %s, want %s", c.args, got, c.asks)
		}
	}
	if value, err := s.secretStoreOf("correct horse").Get("s"); err != nil || string(value) != `["create"] map[]` {
		t.Errorf("saved %q, %v", value, err)
	}

	// C16 and C24: the deploying ones, and gc.
	var collected []string
	f.Change("web1", func(n *protocol.NodeState) { n.Beat.NixOS = "25.05" })
	for _, name := range []string{"web1", "web2"} {
		runners[name].node.Script(fleettest.Script{Answers: func(o *protocol.Verified) (any, error) {
			collected = append(collected, string(o.Payload))
			return protocol.GarbageReport{}, nil
		}})
	}
	s.must("fleet", "gc", w, e, "--batch", "--target=web1")
	if want := fmt.Sprintf(`[{"older_than":%d,"keep":5}]`, 14*24*3600); fmt.Sprint(collected) != want {
		t.Errorf("collected %v, want %s", collected, want)
	}
	s.must("cluster", "upgrade-nixos", "-d", s.dir, e, "--batch", "--nixos-version=25.11", "--target=web1 web2")
	if d := f.Deployments(); len(d) != 1 || len(d[0].Nodes) != 2 || !strings.Contains(s.read("nix-infra.yaml"), "25.11") {
		t.Errorf("%+v", d)
	}
	s.must("fleet", "rollback", e, "--batch", "--ssh-key=k", "--target=web1")
	if d := f.Deployments(); len(d) != 2 || len(d[0].Nodes) != 1 {
		t.Errorf("%+v", d)
	}

	for says, args := range map[string][]string{
		"unknown command \"cmdd\"": {"fleet", "cmdd"},
		"unknown command \"etcd\"": {"fleet", "etcd", "nodes"},
		"did you mean ssh-key?":    {"remove-ssh-key", "--name=k"},
		"did you mean deploy-apps": {"fleet", "deploy-app", "--target=web1"},
		// C18
		"publishes no images yet; have":  {"registry", "publish-image", "-d", s.dir, e, "--batch", "--target=web1", "--image-name=i", "--image-tag=t", "--file=f", "--use-localhost"},
		"nix-infra ssh NODE -- podman":   {"publish-image", "--target=web1"},
		"and push it from there (nix-in": {"registry", "list-images", "--target=web1"},
		"unknown flag: --tarket":         {"cluster", "cmd", "--tarket=web1", "x"},
		"which nodes":                    {"fleet", "gc"},
		"Name it with --target":          {"cluster", "etcd", "nodes", e},
		"ask etcd for what":              {"etcd", e, "--target=web1"},
		"character 5":                    {"etcd", e, "--target=web1", "get $x"},
		"--via":                          {"etcd", e, "--target=web1", "--via=x", "nodes"},
	} {
		s.expect(Refused, says, args...)
	}
}

// TestOlderTunnels makes the calls of the earlier tool that go through tunnels: C10, C15 and C24.
func TestOlderTunnels(t *testing.T) {
	s, f := newFleet(t)
	s.write("old.env", "SSH_KEY=nixinfra\n")
	n := f.Add("web1")
	var to string
	n.Script(fleettest.Script{Tunnels: func(address string) (func(*tunnel.Conn), error) {
		to = address
		return nil, protocol.Refuse(protocol.Denied, "no tunnels here")
	}})
	for _, c := range []struct {
		args []string
		to   string
	}{
		{[]string{"cluster", "port-forward", "-d", s.dir, "--env=old.env", "--target=web1", "--local-port=0", "--remote-port=27017"}, protocol.OverlayHost + ":27017"},
		{[]string{"fleet", "port-forward", "-d", s.dir, "--env", "old.env", "--ssh-key=k", "--batch", "--target", "web1 web2", "--local-port", "0", "--remote-port", "27017"}, "127.0.0.1:27017"},
		{[]string{"fleet", "ssh", "-d=" + s.dir, "--env=old.env", "--target=web1", "--pin"}, "127.0.0.1:22"},
		{[]string{"fleet", "upload", "-d=" + s.dir, "--env=old.env", "--target=web1", "--file=" + s.path("flake.nix") + " " + s.path("modules"), "--remote-path=/root/uploads"}, protocol.TunnelUpload},
	} {
		to = ""
		if r := s.run(c.args...); r.status == OK || to != c.to || !strings.Contains(r.stderr, "no tunnels here") {
			t.Errorf("%q: reached for %q, %+v", c.args, to, r)
		}
	}
	d := startSSHD(t, s.path("ssh", "nixinfra.pub"))
	if d.user != "root" {
		return // who is logged in by default
	}
	n.Script(fleettest.Script{Tunnels: d.toSSHD})
	d.pin(t, s, provision.NodeAlias("web1"))
	s.stdin = "echo $((6*7))\n"
	for _, group := range []string{"cluster", "fleet"} {
		if r := s.run(group, "ssh", "-d", s.dir, "--env=old.env", "--target=web1"); r.status != OK || !strings.Contains(r.out, "42\n") {
			t.Errorf("%s: %+v", group, r)
		}
	}
}

// What etcd's commands ask for is what the rules of every node let a viewer have; what deletes takes an admin.
func TestEtcdIsAllowed(t *testing.T) {
	s, f := newFleet(t)
	s.write("old.env", "CTRL_NODES='ctl1 ctl2'\n")
	ctl := newRunner(f.Add("ctl1"), func(argv []string, send func(protocol.Output), _ <-chan struct{}) (*protocol.Ending, error) {
		_, err := rule.Match(rule.Default(), argv, protocol.Viewer)
		if err != nil {
			return nil, err
		}
		send(protocol.Output{Stdout: []byte("/key\nvalue\n")})
		return success, nil
	})
	for _, k := range etcdKeys {
		if out := s.must("etcd", k.name, "--env=old.env"); out != "/key\nvalue\n" {
			t.Errorf("%s: %q", k.name, out)
		}
	}
	ctl.last()
	s.expect(Refused, "admin", "etcd", "del /cluster/x", "--env=old.env")
	if got := strings.Join(etcdEnvironment("ctl1"), " "); !strings.Contains(got, "ETCDCTL_CERT=/root/certs/ctl1-client-tls.cert.pem") || !strings.Contains(got, "ETCDCTL_API=3") {
		t.Errorf("environment %s", got)
	}
}
