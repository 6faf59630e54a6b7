package rule

import (
	"bufio"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

var people = []protocol.Role{protocol.Viewer, protocol.Operator, protocol.Deployer, protocol.Admin}

func TestDefaultsAreValid(t *testing.T) {
	names := make(map[string]bool)
	for _, r := range Default() {
		if err := r.Validate(); err != nil {
			t.Errorf("%s: %v", r.Name, err)
		}
		if names[r.Name] {
			t.Errorf("two rules are called %s", r.Name)
		}
		names[r.Name] = true
		text, err := json.Marshal(r)
		var back Rule
		if err != nil || json.Unmarshal(text, &back) != nil || len(back.Options) != len(r.Options) || len(back.Forms) != len(r.Forms) {
			t.Errorf("%s does not survive its JSON form: %v", r.Name, err)
		}
		if why := never(r.Program); why != "" && r.Program != "env" {
			t.Errorf("%s has a rule, and a reason to have none: %s", r.Program, why)
		}
	}
}

// hostile reads testdata/hostile.txt: each line, and its words, or why it has none.
func hostile(t *testing.T, each func(line string, argv []string, err error)) {
	f, err := os.Open(filepath.Join("testdata", "hostile.txt"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		var argv []string
		if strings.HasPrefix(line, `["`) || line == "[]" {
			if err := json.Unmarshal([]byte(line), &argv); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			each(line, argv, nil)
			continue
		}
		argv, err := Split(line)
		each(line, argv, err)
	}
}

func TestHostileIsRefused(t *testing.T) {
	rules := Default()
	count := 0
	hostile(t, func(line string, argv []string, err error) {
		count++
		if err != nil {
			// What Split refuses is refused all the same where its words come to the node without it.
			if allowed, err := Match(rules, strings.Fields(line), protocol.Admin); err == nil {
				t.Errorf("%s: its words alone run %q", line, allowed.Argv)
			}
		} else {
			for _, role := range people {
				allowed, err := Match(rules, argv, role)
				var refusal *protocol.Refusal
				switch {
				case err == nil:
					t.Errorf("%s: %s may run %q", line, role, allowed.Argv)
				case !errors.As(err, &refusal) || refusal.Code != protocol.Denied:
					t.Errorf("%s: %s is told %v", line, role, err)
				}
			}
			_, err = Match(rules, argv, protocol.Admin)
		}
		if err != nil && (strings.ContainsAny(err.Error(), "\n\x00\x1b") || len(err.Error()) > 1500) {
			t.Errorf("%s: the refusal is not one line: %q", line, err.Error())
		}
	})
	if count < 200 {
		t.Errorf("only %d lines", count)
	}
}

// TestAllowed is a table of what may be run by whom, and of the words that run: not those that were given, but those
// that were understood.
func TestAllowed(t *testing.T) {
	for _, c := range []struct {
		role protocol.Role // the least
		text string
		want string // the words that are run, with | between
	}{
		{protocol.Viewer, `systemctl`, "systemctl|--no-pager"},
		{protocol.Viewer, `systemctl status nginx`, "systemctl|status|--no-pager|nginx"},
		{protocol.Viewer, `systemctl --no-pager status 'nginx*' sshd.service`, "systemctl|--no-pager|status|nginx*|sshd.service"},
		{protocol.Viewer, `systemctl show -p ActiveState,SubState --property=Id nginx`, "systemctl|show|--no-pager|-pActiveState,SubState|--property=Id|nginx"},
		{protocol.Viewer, `systemctl list-units --failed -t service -al`, "systemctl|list-units|--no-pager|--failed|-tservice|-a|-l"},
		{protocol.Viewer, `systemctl is-active nginx`, "systemctl|is-active|--no-pager|nginx"},
		{protocol.Viewer, `systemctl cat getty@tty1`, "systemctl|cat|--no-pager|getty@tty1"},
		{protocol.Operator, `systemctl restart nginx`, "systemctl|restart|--no-ask-password|nginx"},
		{protocol.Operator, `systemctl restart --no-block nginx app@1.service backup.timer`, "systemctl|restart|--no-ask-password|--no-block|nginx|app@1.service|backup.timer"},
		{protocol.Operator, `systemctl reset-failed nginx.service`, "systemctl|reset-failed|--no-ask-password|nginx.service"},
		{protocol.Viewer, `journalctl`, "journalctl|--no-pager"},
		{protocol.Viewer, `journalctl -fu nginx`, "journalctl|--no-pager|-f|-unginx"},
		{protocol.Viewer, `journalctl -u nginx -u sshd -n 50 -b -1 --since "1 hour ago"`, "journalctl|--no-pager|-unginx|-usshd|-n50|-b-1|--since=1 hour ago"},
		{protocol.Viewer, `journalctl -b --lines=20 -o json _PID=1 + _COMM=sshd`, "journalctl|--no-pager|-b|--lines=20|-ojson|_PID=1|+|_COMM=sshd"},
		{protocol.Viewer, `journalctl -p err..warning -g 'a b' --until=-5m`, "journalctl|--no-pager|-perr..warning|-ga b|--until=-5m"},
		{protocol.Viewer, `dmesg -T -l err,warn`, "dmesg|--nopager|-T|-lerr,warn"},
		{protocol.Viewer, `ps aux`, "ps|aux"},
		{protocol.Viewer, `ps -eo pid,%cpu,comm --sort=-%cpu`, "ps|-e|-opid,%cpu,comm|--sort=-%cpu"},
		{protocol.Viewer, `top`, "top|-b|-n1"},
		{protocol.Viewer, `top -n2 -o %MEM`, "top|-b|-n2|-o%MEM"},
		{protocol.Viewer, `free -h`, "free|-h"},
		{protocol.Viewer, `vmstat 1 5`, "vmstat|1|5"},
		{protocol.Viewer, `iostat -dx sda 1 2`, "iostat|-d|-x|sda|1|2"},
		{protocol.Viewer, `df -hT /`, "df|-h|-T|/"},
		{protocol.Viewer, `du -sh /var/log/`, "du|-s|-h|/var/log/"},
		{protocol.Viewer, `lsblk -fo NAME,SIZE`, "lsblk|-f|-oNAME,SIZE"},
		{protocol.Viewer, `fdisk`, "fdisk|-l"},
		{protocol.Viewer, `fdisk -l /dev/sda`, "fdisk|-l|/dev/sda"},
		{protocol.Viewer, `mount`, "mount"},
		{protocol.Viewer, `lsof -i :80 -nP`, "lsof|-i:80|-n|-P"},
		{protocol.Viewer, `lsof -iTCP -sTCP:LISTEN`, "lsof|-iTCP|-sTCP:LISTEN"},
		{protocol.Viewer, `fuser -v 80/tcp`, "fuser|-v|80/tcp"},
		{protocol.Viewer, `find /etc -name '*.conf' -mtime -1 -not '(' -type l -o -empty ')' -printf '%p\n'`,
			`find|/etc|-name|*.conf|-mtime|-1|-not|(|-type|l|-o|-empty|)|-printf|%p\n`},
		{protocol.Viewer, `grep -rn 'a|b' /etc/nixos`, "grep|-r|-n|a|b|/etc/nixos"},
		{protocol.Viewer, `grep -e --x -c /etc/hosts`, "grep|-e--x|-c|/etc/hosts"},
		{protocol.Viewer, `cat /etc/os-release`, "cat|/etc/os-release"},
		{protocol.Viewer, `tail -fn 100 /var/log/messages`, "tail|-f|-n100|/var/log/messages"},
		{protocol.Viewer, `ls -la /etc`, "ls|-l|-a|/etc"},
		{protocol.Viewer, `ip a`, "ip|a"},
		{protocol.Viewer, `ip -br -4 addr show dev eth0`, "ip|-br|-4|addr|show|dev|eth0"},
		{protocol.Viewer, `ip route get 10.0.0.1`, "ip|route|get|10.0.0.1"},
		{protocol.Viewer, `ip link show up`, "ip|link|show|up"},
		{protocol.Viewer, `ss -tulpn`, "ss|-t|-u|-l|-p|-n"},
		{protocol.Viewer, `ss -tn state established '( dport = :443 )'`, "ss|-t|-n|state|established|( dport = :443 )"},
		{protocol.Viewer, `iptables -nvL`, "iptables|-w5|-n|-v|-L"},
		{protocol.Viewer, `iptables -L -n`, "iptables|-w5|-L|-n"},
		{protocol.Viewer, `iptables -t nat -S POSTROUTING`, "iptables|-w5|-tnat|-SPOSTROUTING"},
		{protocol.Viewer, `nft list ruleset`, "nft|list|ruleset"},
		{protocol.Viewer, `wg show wg0 peers`, "wg|show|wg0|peers"},
		{protocol.Viewer, `ping example.org`, "ping|-c4|example.org"},
		{protocol.Viewer, `ping -c 2 10.0.0.1`, "ping|-c2|10.0.0.1"},
		{protocol.Viewer, `dig @1.1.1.1 example.org MX +short`, "dig|@1.1.1.1|example.org|MX|+short"},
		{protocol.Viewer, `dmidecode -t memory`, "dmidecode|-tmemory"},
		{protocol.Viewer, `lshw -short -C disk`, "lshw|-short|-C|disk"},
		{protocol.Viewer, `date -u '+%F %T'`, "date|-u|+%F %T"},
		{protocol.Viewer, `hostnamectl`, "hostnamectl"},
		{protocol.Viewer, `hostname -f`, "hostname|-f"},
		{protocol.Viewer, `etcdctl get --prefix /cluster/nodes`, "etcdctl|get|--prefix|/cluster/nodes"},
		{protocol.Viewer, `etcdctl get /coreos.com --prefix -w json`, "etcdctl|get|/coreos.com|--prefix|-wjson"},
		{protocol.Viewer, `etcdctl watch --prefix /cluster`, "etcdctl|watch|--prefix|/cluster"},
		{protocol.Viewer, `etcdctl endpoint health --cluster`, "etcdctl|endpoint|health|--cluster"},
		{protocol.Viewer, `etcdctl member list`, "etcdctl|member|list"},
		{protocol.Admin, `etcdctl del --prefix /cluster/services`, "etcdctl|del|--prefix|/cluster/services"},
		{protocol.Admin, `etcdctl put /cluster/a '{"x": 1}'`, `etcdctl|put|/cluster/a|{"x": 1}`},
		{protocol.Viewer, `podman ps -a --format '{{.Names}}'`, "podman|ps|-a|--format={{.Names}}"},
		{protocol.Viewer, `podman logs -f --tail 10 web`, "podman|logs|-f|--tail=10|web"},
		{protocol.Viewer, `nixos-version --json`, "nixos-version|--json"},
		{protocol.Viewer, `nix-store --requisites /run/current-system`, "nix-store|-q|--requisites|/run/current-system"},
		{protocol.Viewer, `nix-env -p /nix/var/nix/profiles/system --list-generations`, "nix-env|-p/nix/var/nix/profiles/system|--list-generations"},
		{protocol.Deployer, `nix-prefetch-url --unpack https://example.org/a.tar.gz`, "nix-prefetch-url|--unpack|https://example.org/a.tar.gz"},
	} {
		argv, err := Split(c.text)
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		for _, role := range people {
			allowed, err := Match(Default(), argv, role)
			switch {
			case !role.AtLeast(c.role):
				if !errors.Is(err, &protocol.Refusal{Code: protocol.OverRole}) {
					t.Errorf("%s, %s: %v", c.text, role, err)
				}
			case err != nil:
				t.Errorf("%s, %s: %v", c.text, role, err)
			case strings.Join(allowed.Argv, "|") != c.want:
				t.Errorf("%s, %s: runs %q", c.text, role, allowed.Argv)
			}
		}
	}
}

// What is no person's role runs nothing.
func TestOnlyPeople(t *testing.T) {
	for _, role := range []protocol.Role{protocol.Node, protocol.Controller, "", "root"} {
		if _, err := Match(Default(), []string{"id"}, role); err == nil {
			t.Errorf("%q may run id", role)
		}
	}
}

// TestRoot keeps the list of what runs as root, by default, the one that was thought about.
func TestRoot(t *testing.T) {
	want := []string{"dmesg", "dmidecode", "etcdctl", "etcdctl write", "fdisk", "findmnt", "fuser", "ip6tables", "iptables", "lsblk", "lshw", "lsof", "lsusb", "mount", "netstat", "nft",
		"nix-env", "podman", "ss", "systemctl control", "wg"}
	var root []string
	for _, r := range Default() {
		if r.User == "root" {
			root = append(root, r.Name)
		} else if r.User != "" {
			t.Errorf("%s runs as %s", r.Name, r.User)
		}
	}
	slices.Sort(root)
	if !slices.Equal(root, want) {
		t.Errorf("%q", root)
	}
}

func TestEnviron(t *testing.T) {
	dir := t.TempDir()
	key := filepath.Join(dir, "web1.pem")
	if err := os.WriteFile(key, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := Rule{Env: []Variable{{Name: "A", Value: "1"}, {Name: "KEY", Value: dir + "/{node}.pem", IfExists: true}, {Name: "NODE", Value: "{node}"}}}
	if got := r.Environ("web1"); !slices.Equal(got, []string{"A=1", "KEY=" + key, "NODE=web1"}) {
		t.Errorf("%q", got)
	}
	if got := r.Environ("web2"); !slices.Equal(got, []string{"A=1", "NODE=web2"}) {
		t.Errorf("without the file: %q", got)
	}
}
