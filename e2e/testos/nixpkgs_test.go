//go:build linux

package testos_test

import (
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/testos"
)

// The stand-in's lib does what nixpkgs' does; the same file has been held against that.
func testLibrary(t *testing.T, m *machine) {
	must(t, m.CopyTo("testdata/lib.nix", "/root/lib.nix", 0o644))
	if failed := m.sh(t, "nix-instantiate --eval --strict --json /root/lib.nix --argstr libPath "+testos.NixpkgsPath+"/lib"); failed != "[]" {
		t.Errorf("other than in nixpkgs: %s", failed)
	}
}

// nixos makes the node's /root/nixos a NixOS configuration with this text in its module.
func (m *machine) nixos(t *testing.T, text string) {
	t.Helper()
	lock, err := testos.FlakeLock("25.11")
	must(t, err)
	for name, data := range map[string]string{
		"flake.lock": string(lock),
		"flake.nix": `{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";
  outputs = { nixpkgs, ... }: { nixosConfigurations.n1 = nixpkgs.lib.nixosSystem { system = "x86_64-linux"; modules = [ ./configuration.nix ]; }; };
}
`,
		"configuration.nix": "{ config, lib, pkgs, ... }: {\n  imports = [ /etc/nixos/networking.nix ];\n" + text + "\n}\n",
	} {
		must(t, m.WriteFile("/root/nixos/"+name, []byte(data), 0o644))
	}
}

const buildNixOS = "nix build --impure --no-link --print-out-paths path:/root/nixos#nixosConfigurations.n1.config.system.build.toplevel"

func testConfigurations(t *testing.T, m *machine) {
	build := func(text string) string {
		t.Helper()
		m.nixos(t, text)
		return m.sh(t, buildNixOS+" 2>/tmp/log || { cat /tmp/log; exit 1; }")
	}
	ssh := `services.openssh = { enable = true; ports = [ 22 2222 ]; settings.X11Forwarding = false; };`
	first := build(ssh + `
		users.users.app = { isSystemUser = true; group = "app"; extraGroups = [ "wheel" ]; home = "/var/lib/app"; createHome = true; description = "it's app"; };
		users.groups.app.gid = 990;
		users.users.root.openssh.authorizedKeys.keys = [ "ssh-ed25519 AAAA me" ];
		environment.etc."app.conf" = { source = pkgs.writeText "app.conf" "one\n"; mode = "0640"; };
		environment.variables.EDITOR = "vi";
		systemd.tmpfiles.rules = [ "d /run/app 0700 app app -" ];
		boot.kernel.sysctl."vm.swappiness" = 10;
		networking.firewall.allowedTCPPorts = [ 80 ];
		systemd.services.app = {
			description = "100 %"; wantedBy = [ "multi-user.target" ]; environment.WORD = "a \"b\""; path = [ pkgs.jq ];
			preStart = "jq -n 1 >/run/app/ready"; script = "echo \"$WORD\" >/run/app/word; exec sleep infinity";
			serviceConfig = { User = "app"; Type = "exec"; };
		};
		systemd.services.daily = { script = "true"; startAt = "daily"; serviceConfig.Type = "oneshot"; };
		systemd.sockets.web = { wantedBy = [ "sockets.target" ]; listenStreams = [ "127.0.0.1:8080" ]; socketConfig.Accept = true; };
		systemd.services."web@".serviceConfig = { ExecStart = "${pkgs.coreutils}/bin/echo pong"; StandardInput = "socket"; StandardOutput = "socket"; };
		systemd.services.cron-like = lib.mkIf false { script = "never"; };
		systemd.services.systemd-journald.serviceConfig.Nice = 1;`)
	m.ok(t, first, "test")
	contains(t, m.sh(t, `id app; stat -c '%a %U' /var/lib/app /run/app /etc/app.conf; cat /etc/app.conf /run/app/ready /etc/ssh/authorized_keys.d/root /etc/testos/networking
		getent passwd app; systemctl is-active daily.timer web.socket; sshd -T | grep -e ^port -e ^x11f; bash -c 'cat </dev/tcp/127.0.0.1/8080'; timeout 30 sh -c "until [ -s /run/app/word ]; do sleep 0.1; done"; cat /run/app/word
		systemctl show -p Nice systemd-journald; . /etc/profile.d/nixos.sh; echo $EDITOR`),
		"gid=990(app) groups=990(app)", "(wheel)", "700 app\n700 app\n640 root\none\n1\nssh-ed25519 AAAA me\nstatic\n", "it's app:/var/lib/app:/usr/sbin/nologin\n", "active\nactive\n",
		"port 22\nport 2222\n", "x11forwarding no", "pong", "a \"b\"\n", "Nice=1", "vi")
	// Others than these are dropped, at the network's side.
	reached := func(port string) bool {
		return m.lab.Command(t.Context(), "timeout", "5", "bash", "-c", "</dev/tcp/"+m.IP+"/"+port).Run() == nil
	}
	m.sh(t, "systemd-run --quiet --collect --unit=eighty nc -lk 80; systemd-run --quiet --collect --unit=other nc -lk 81; timeout 30 sh -c 'until nc -z 127.0.0.1 80 && nc -z 127.0.0.1 81; do sleep 0.1; done'")
	if !reached("22") || !reached("2222") || !reached("80") || reached("81") {
		t.Error("other ports are open than the firewall says")
	}
	m.sh(t, "systemctl stop eighty other")

	second := build(ssh + `services.openssh.openFirewall = false; systemd.services.systemd-journald.serviceConfig.Nice = 2;`)
	contains(t, m.ok(t, second, "test"), "stopping the following units: app.service, daily.timer, web.socket", "reloading the following units: firewall.service")
	if reached("22") {
		t.Error("port 22 is open, and nothing opens it")
	}

	for want, text := range map[string]string{
		"option `networking.firewal' does not exist":                  `networking.firewal.enable = false;`,
		"option `services.postgresql' does not exist":                 `services.postgresql.enable = true;`,
		"is not of type `list of 16 bit unsigned integer":             `networking.firewall.allowedTCPPorts = "80";`,
		"Failed assertions:\n- users.users.app.group is unset":        `users.users.app.isSystemUser = true;`,
		"conflicting definition values":                               `networking.hostName = lib.mkMerge [ "a" "b" ];`,
		"pkgs.podman is Debian's package podman, which this node has": `environment.systemPackages = [ pkgs.podman ];`,
		"compiles and fetches nothing":                                `environment.systemPackages = [ (pkgs.fetchurl { }) ];`,
		"attribute 'hello' missing":                                   `environment.systemPackages = [ pkgs.hello ];`,
	} {
		m.nixos(t, text)
		if out, err := m.Exec(t.Context(), "sh", "-c", buildNixOS); err == nil || !strings.Contains(strings.ReplaceAll(string(out), "       -", "-"), want) {
			t.Errorf("%s: %v\n%s", want, err, out)
		}
	}
}
