//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/lab"
	"github.com/nix-infra/nix-infra/e2e/nar"
	"github.com/nix-infra/nix-infra/e2e/testos"
)

// ownFlake is a project's flake.nix.
const ownFlake = `{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-[%%nixVersion%%]";
  outputs = { nixpkgs, ... }: {
    nixosConfigurations."[%%nodeName%%]" = nixpkgs.lib.nixosSystem {
      system = "[%%hwArch%%]";
      modules = [ ./configuration.nix ];
    };
  };
}
`

// ownBase is its configuration.nix: the project brings the modules of nix-infra itself, in modules/.
const ownBase = `{ lib, ... }: {
  imports = [ ./networking.nix ./modules/nix-infra ]
    ++ lib.fileset.toList (lib.fileset.maybeMissing (./. + "/[%%nodeName%%].nix"));
  networking.hostName = "[%%nodeName%%]";
  system.stateVersion = "[%%nixVersion%%]";
  services.openssh.enable = true;
}
`

// packaged puts a program into a node's store, and gives the Nix expression of a package that has it.
func (f *fleet) packaged(n *lab.Node, local, program string) string {
	f.t.Helper()
	dir := f.t.TempDir()
	data, err := os.ReadFile(local)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin", program), data, 0o755); err != nil {
		f.t.Fatal(err)
	}
	hash, err := nar.Hash(os.DirFS(dir), ".")
	if err != nil {
		f.t.Fatal(err)
	}
	remote := "/root/packages/" + program
	if err := n.CopyTo(local, remote+"/bin/"+program, 0o755); err != nil {
		f.t.Fatal(err)
	}
	f.exec(n, "nix-store", "--add-fixed", "--recursive", "sha256", remote)
	return fmt.Sprintf(`pkgs.requireFile { name = %q; hash = %q; hashMode = "recursive"; }`, program, hash)
}

// nixosProject makes the fleet's project, whose nodes were testos's, one of NixOS's modules, which it brings itself.
func (f *fleet) nixosProject() {
	f.t.Helper()
	for _, dir := range []string{"modules", "app_modules", "node_types"} {
		if err := os.RemoveAll(filepath.Join(f.project, dir)); err != nil {
			f.t.Fatal(err)
		}
	}
	lock, err := testos.FlakeLock(testos.DefaultVersion)
	if err != nil {
		f.t.Fatal(err)
	}
	f.write("flake.nix", ownFlake)
	f.write("flake.lock", string(lock))
	f.write("configuration.nix", ownBase)
	for _, name := range nixFiles(f.t, "../nixos-module") {
		data, err := os.ReadFile(name)
		if err != nil {
			f.t.Fatal(err)
		}
		f.write(path.Join("modules/nix-infra", filepath.Base(name)), string(data))
	}
}

// TestNixOSModules: systems that nixos-module makes, built by real Nix from a stand-in of nixpkgs, bring the real agent and
// the real controller: units, policy, health checks, secrets and the firewall do what their options say.
func TestNixOSModules(t *testing.T) {
	f := newFleet(t, "n1")
	node := f.nodes["n1"]
	f.nixosProject()

	t.Run("Options", func(t *testing.T) { f.as(t).moduleOptions(node) })
	t.Run("Agent", func(t *testing.T) { f.as(t).moduleOfAgent(node) })
	if t.Failed() {
		return
	}
	t.Run("Token", func(t *testing.T) { f.as(t).moduleOfToken() })
	t.Run("Controller", func(t *testing.T) { f.as(t).moduleOfController() })
}

// moduleOptions has the node's Nix evaluate the modules with a node that uses everything, and with mistakes.
func (f *fleet) moduleOptions(node *lab.Node) {
	for _, dir := range []string{"../nixos-module", "../nixos-module/eval"} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			f.t.Fatal(err)
		}
		for _, e := range entries {
			if e.IsDir() {
				continue
			}
			name := filepath.Join(dir, e.Name())
			if err := node.CopyTo(name, path.Join("/root", strings.TrimPrefix(name, "..")), 0o755); err != nil {
				f.t.Fatal(err)
			}
		}
	}
	out := f.exec(node, "env", "NIXPKGS_LIB="+testos.NixpkgsPath+"/lib", "/root/nixos-module/eval/check.sh")
	if !strings.HasSuffix(out, " 0 failed") || strings.HasPrefix(out, "0 ") {
		f.t.Errorf("%s", out)
	}
}

func (f *fleet) moduleOfAgent(node *lab.Node) {
	t := f.t
	agent := f.packaged(node, programs.next, "nix-infra-agent")
	config := func(closeSSH bool, app string) string {
		return fmt.Sprintf(`{ pkgs, ... }: {
  services.nix-infra-agent = {
    enable = true;
    package = %s;
    closeSSH = %v;
    policy = {
      commands = [ { name = "app"; program = "app-ctl"; role = "viewer"; forms = [ { words = [ "status" ]; } ]; } ];
      files.roots = [ "/var/lib/app" ];
    };
    healthChecks = [
      { name = "runs"; kind = "unit"; unit = "hello.service"; grace = 2; }
      { name = "token"; kind = "file"; path = "/var/lib/app/loaded"; contains = "hunter2"; grace = 2; }
    ];
  };
  nix-infra.secrets."[%%%%secrets/app.token%%%%]".units = [ "hello" ];
  environment.systemPackages = [ (pkgs.writeShellScriptBin "app-ctl" "echo fine") ];
  users.users.app = { isSystemUser = true; group = "app"; };
  users.groups.app = { };
  networking.firewall.allowedTCPPorts = [ 8080 ];
  systemd.tmpfiles.rules = [ "d /var/lib/app 0755 app app -" ];
  systemd.services.hello = {
    wantedBy = [ "multi-user.target" ];
    preStart = "cp --no-preserve=mode \"$CREDENTIALS_DIRECTORY/app.token\" /var/lib/app/loaded";
    script = %q;
    serviceConfig = { User = "app"; Type = "exec"; };
  };
}
`, agent, closeSSH, app)
	}
	f.feed(0, "hunter2", "secrets", "store", "app.token")
	if r := f.cli("exec", "n1", "--", "app-ctl", "status"); r.code != 2 {
		t.Errorf("before the policy allows it: %v", r)
	}
	f.write("nodes/n1.nix", config(false, "exec sleep infinity"))
	f.must("deploy", "n1", "--timeout", "60s", "--settle", "1s", "--batch")
	s := f.status()["n1"]
	if s.State != "confirmed" || s.Agent != "next" || s.Closure != f.running(node) || s.Closure != f.bootDefault(node) {
		t.Fatalf("the agent of the module did not take over: %+v", s)
	}
	if exe := f.exec(node, "readlink", "/proc/"+f.property(node, "nix-infra-agent.service", "MainPID")+"/exe"); !strings.HasPrefix(exe, "/nix/store/") {
		t.Errorf("the agent that runs is %s", exe)
	}
	if unit := f.property(node, "nix-infra-agent.service", "FragmentPath"); !strings.Contains(unit, "generator.early") {
		t.Errorf("the agent's unit is %s, and not the system's", unit)
	}
	show := f.must("deployment", "show", s.Deployment, "--json").out
	for _, check := range []string{"runs", "token"} {
		if !strings.Contains(show, `"name":"`+check+`"`) || strings.Contains(show, `"passed":false`) {
			t.Errorf("the check %s has not passed: %s", check, show)
		}
	}
	if r := f.must("exec", "n1", "--", "app-ctl", "status"); strings.TrimSpace(r.out) != "fine" {
		t.Errorf("a command that the policy allows: %v", r)
	}
	if r := f.must("files", "/var/lib/app/loaded", "n1"); r.out != "hunter2" {
		t.Errorf("a file below a folder that the policy allows: %v", r)
	}

	// A health check that fails is as good as one that was written by hand.
	f.write("nodes/n1.nix", config(false, "exit 0"))
	if r := f.cli(f.deployArgs("n1")...); r.code != 1 || !strings.Contains(r.out+r.errOut, "runs") {
		t.Errorf("a deploy whose health check fails: %v", r)
	}
	f.isBack(node, s.Closure)

	f.opens(node, 22) // as long as nobody closes it
	f.write("nodes/n1.nix", config(true, "exec sleep infinity"))
	f.must("deploy", "n1", "--timeout", "60s", "--settle", "1s", "--batch")
	closed := func(when string) {
		t.Helper()
		if f.reaches(node, 22) {
			t.Errorf("port 22 is open %s", when)
		}
		if out := f.exec(node, "bash", "-c", "head -c 4 </dev/tcp/127.0.0.1/22"); out != "SSH-" {
			t.Errorf("sshd itself says %q %s", out, when)
		}
		if r := f.must("exec", "n1", "--", "app-ctl", "status"); strings.TrimSpace(r.out) != "fine" {
			t.Errorf("the agent %s: %v", when, r)
		}
	}
	closed("after closeSSH")

	// The agent that comes with the boot is the system's.
	if err := node.Reboot(f.ctx); err != nil {
		t.Fatal(err)
	}
	f.answers("n1")
	f.waitState("n1", soon, "online again", func(s status) bool { return s.Online && s.Agent == "next" })
	closed("after a reboot")
}

// switchTo has a machine without an agent build a system on itself, as an image is made, and switch to it. own is its
// file of the project.
func (f *fleet) switchTo(n *lab.Node, own string) {
	f.t.Helper()
	const dir = "/root/system"
	fill := strings.NewReplacer("[%%nodeName%%]", n.Name, "[%%nixVersion%%]", testos.DefaultVersion, "[%%hwArch%%]", "x86_64-linux")
	files := map[string]string{"flake.nix": fill.Replace(ownFlake), "configuration.nix": fill.Replace(ownBase), n.Name + ".nix": own}
	for name, text := range files {
		if err := n.WriteFile(path.Join(dir, name), []byte(text), 0o644); err != nil {
			f.t.Fatal(err)
		}
	}
	for _, name := range append(nixFiles(f.t, filepath.Join(f.project, "modules/nix-infra")), filepath.Join(f.project, "flake.lock")) {
		rel, err := filepath.Rel(f.project, name)
		if err != nil {
			f.t.Fatal(err)
		}
		if err := n.CopyTo(name, path.Join(dir, rel), 0o644); err != nil {
			f.t.Fatal(err)
		}
	}
	f.exec(n, "cp", "/etc/nixos/networking.nix", dir)
	top := f.exec(n, "sh", "-c", "nix build --no-link --print-out-paths path:"+dir+"#nixosConfigurations."+n.Name+".config.system.build.toplevel 2>/tmp/log || { cat /tmp/log; exit 1; }")
	f.exec(n, "nix-env", "--profile", "/nix/var/nix/profiles/system", "--set", top)
	f.exec(n, top+"/bin/switch-to-configuration", "switch")
}

// moduleOfToken: an image that has the agent becomes a node by the token that it finds, and stays one.
func (f *fleet) moduleOfToken() {
	t := f.t
	nodes, err := f.lab.Start(f.ctx, "n2")
	if err != nil {
		t.Fatal(err)
	}
	node := nodes[0]
	const file, joins = "/run/nix-infra/token", "nix-infra-agent-join.service"
	agent := f.packaged(node, programs.next, "nix-infra-agent")
	f.switchTo(node, `{ pkgs, ... }: {
  services.nix-infra-agent = { enable = true; package = `+agent+`; tokenFile = "`+file+`"; };
}
`)
	if state := f.property(node, joins, "ActiveState") + " " + f.property(node, "nix-infra-agent.service", "ActiveState"); state != "inactive inactive" {
		t.Errorf("without a token, the units are %s", state)
	}
	token := f.token("n2")
	if err := node.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.exec(node, "systemctl", "start", "--no-block", joins)
	f.eventually(soon, func() string {
		if r := f.cli("enroll", "--pending", "n2"); r.code != 0 {
			return r.String()
		}
		return ""
	})
	f.waitState("n2", soon, "online", func(s status) bool { return s.Online && s.Agent == "next" })
	if err := node.Reboot(f.ctx); err != nil {
		t.Fatal(err)
	}
	f.answers("n2")
	if unit := f.property(node, "nix-infra-agent.service", "FragmentPath"); !strings.Contains(unit, "generator.early") {
		t.Errorf("the agent's unit is %s, and not the system's", unit)
	}
}

func (f *fleet) moduleOfController() {
	t := f.t
	const unit = "nix-infra-controller.service"
	controller := f.packaged(f.ctl, filepath.Join(programs.dir, "nix-infra-controller"), "nix-infra-controller")
	f.switchTo(f.ctl, `{ pkgs, ... }: {
  services.nix-infra-controller = {
    enable = true;
    package = `+controller+`;
    openFirewall = true;
    settings.broker.max_connections = 1000;
  };
}
`)

	runs := func(when string) {
		t.Helper()
		f.answers("n1") // which is connected again
		pid := f.property(f.ctl, unit, "MainPID")
		if user := f.exec(f.ctl, "ps", "-o", "user:32=", "-p", pid); user != "nix-infra-controller" {
			t.Errorf("%s, the controller runs as %q", when, user)
		}
		if exe := f.exec(f.ctl, "readlink", "/proc/"+pid+"/exe"); !strings.HasPrefix(exe, "/nix/store/") {
			t.Errorf("%s, the controller that runs is %s", when, exe)
		}
	}
	// Enrolment's unit is in neither system, so that the switch has left its process alone.
	f.exec(f.ctl, "systemctl", "restart", unit)
	runs("after a restart")
	f.opens(f.ctl, 4222, 443, 22) // the firewall keeps nobody from them
	if err := f.ctl.Reboot(f.ctx); err != nil {
		t.Fatal(err)
	}
	runs("after a reboot")
	f.must("deploy", "n1", "--timeout", "60s", "--settle", "1s", "--batch")
}

func nixFiles(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.nix"))
	if err != nil || len(names) == 0 {
		t.Fatalf("%s: %v, %v", dir, names, err)
	}
	return names
}
