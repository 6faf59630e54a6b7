//go:build linux

package e2e

import (
	"strings"
	"testing"
)

// TestDefaultRules runs what the default rules allow for real, of the programs that the node has: each has to work with the
// words that Match makes of it, as the user and in the sandbox that its rule gives it.
func TestDefaultRules(t *testing.T) {
	f := shared(t)
	node := f.nodes["n1"]
	// As NixOS has it: everybody may ping.
	f.exec(node, "sh", "-c", "echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range")
	kernel := strings.TrimSpace(f.exec(node, "uname", "-r"))
	for _, c := range []struct {
		text string
		says string // in its output
	}{
		{`uname -r`, kernel},
		{`id`, "uid="},
		{`uptime -p`, "up "},
		{`who -b`, ""},
		{`w -h`, ""},
		{`nproc --all`, ""},
		{`hostname`, "n1"},
		{`date -u +%Z`, "UTC"},
		{`env`, "PATH="},
		{`echo "a b" 'c;d'`, "a b c;d"},
		{`getent passwd root`, "root:x:0"},
		{`systemctl status systemd-journald`, "Active: active"},
		{`systemctl show -p ActiveState systemd-journald`, "ActiveState=active"},
		{`systemctl list-units 'systemd-journald*' --no-legend`, "systemd-journald.service"},
		{`systemctl cat systemd-journald`, "[Service]"},
		{`systemctl is-active systemd-journald`, "active"},
		{`journalctl -b -n 5 -o short-iso`, "n1"},
		{`journalctl -u systemd-journald --lines=1 -q`, ""},
		{`ps aux`, "nix-infra-agent"},
		{`ps -eo pid,comm --sort=-pid`, "PID"},
		{`ps -e -o pid,args --no-headers`, "nix-infra-agent"},
		{`top`, "load average"},
		{`pgrep -a nix-infra`, "nix-infra-agent"},
		{`free -m`, "Mem:"},
		{`vmstat -w`, "memory"},
		{`df -hT /`, "Mounted on"},
		{`du -s /etc/ssh`, "/etc/ssh"},
		{`lsblk -o NAME,SIZE`, ""},
		{`mount -l`, " on / "},
		{`findmnt -n -o TARGET /`, "/"},
		{`findmnt --json -T /etc`, "filesystems"},
		{`ls -la --full-time /etc/`, "os-release"},
		{`cat /etc/os-release`, "NAME="},
		{`head -n2 /etc/os-release`, "="},
		{`tail -n 1 /etc/passwd`, ":"},
		{`wc -l /etc/passwd`, "/etc/passwd"},
		{`grep -rn '^root:' /etc/passwd`, "1:root"},
		{`grep -c -e ^root -e ^bin /etc/passwd`, "2"},
		{`find /etc -maxdepth 1 -name 'os-*' '(' -type f -o -type l ')'`, "/etc/os-release"},
		{`find /etc -maxdepth 1 -name os-release -printf '%f\n'`, "os-release"},
		{`stat -c %U /etc/passwd`, "root"},
		{`readlink -f /etc/os-release`, "os-release"},
		{`sha256sum /etc/passwd`, "/etc/passwd"},
		{`ip -br a`, node.IP},
		{`ip -4 addr show dev lo`, "127.0.0.1"},
		{`ip route get 127.0.0.1`, "dev lo"},
		{`ss -tlpn`, ":22"},
		{`ss -tn state established '( dport = :4222 )'`, ""},
		{`lscpu -J`, "lscpu"},
		{`ping -c 1 -W 5 127.0.0.1`, "1 received"},
		{`nft list ruleset`, ""},
		{`nix-env -p /nix/var/nix/profiles/default --list-generations`, ""},
		{`timedatectl show -p Timezone`, "Timezone"},
		{`hostnamectl hostname`, "n1"},
		{`loginctl list-sessions`, ""},
		{`systemd-analyze time`, ""},
		{`systemd-cgls -l`, ""},
	} {
		t.Run(c.text, func(t *testing.T) {
			f := f.as(t)
			program, _, _ := strings.Cut(c.text, " ")
			if _, err := node.Exec(f.ctx, "which", program); err != nil {
				t.Skipf("%s is not on the node", program)
			}
			if r := f.cli("cmd", "--target=n1", c.text); r.code != 0 || !strings.Contains(r.out, c.says) {
				t.Error(r)
			}
		})
	}
}
