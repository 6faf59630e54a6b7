package sshtest

import (
	"crypto/rand"
	"encoding/hex"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// Runs makes the machine one that runs an operating system: osRelease is the text of its /etc/os-release. systemd-run
// there really runs what it is told, and a reboot boots NixOS where a file nixos lies in $FAKE_ROOT.
func (h *Host) Runs(t testing.TB, osRelease string) {
	for _, dir := range []string{"/proc/sys/kernel/random", "/root/.ssh", "/home/admin/.ssh", "/etc", "/run", "/unit"} {
		must(t, os.MkdirAll(h.Path(dir), 0o755))
	}
	must(t, os.WriteFile(h.Path("/etc/os-release"), []byte(osRelease), 0o644))
	h.reboot(t)
	h.script(t, "id", `echo 0`)
	for _, none := range []string{"ip", "sshd", "stat"} {
		h.script(t, none, `exit 1`)
	}
	h.script(t, "getent", `echo "$2:x:1000:1000::$FAKE_HOME/$2:/bin/bash"`)
	h.script(t, "systemd-run", `
unit=$FAKE_ROOT/unit
echo "$*" >>"$unit/asked"
while [ $# -gt 0 ]; do
  case $1 in
  --setenv=*) export "${1#--setenv=}" ;;
  --property=StandardOutput=append:*) log=${1#--property=StandardOutput=append:} ;;
  --*) ;;
  *) break ;;
  esac
  shift
done
[ ! -e "$unit/state" ] || { echo "Unit was already loaded" >&2; exit 1; }
echo "active running success 0" >"$unit/state.new"
mv "$unit/state.new" "$unit/state"
(
  if "$@" >>"$log" 2>&1; then echo "active exited success 0"; else echo "failed failed exit-code $?"; fi >"$unit/state.new"
  mv "$unit/state.new" "$unit/state"
) >/dev/null 2>&1 </dev/null &`)
	h.script(t, "systemctl", `
unit=$FAKE_ROOT/unit
case $1 in
show)
  state="inactive dead success 0"
  [ ! -e "$unit/state" ] || read -r state <"$unit/state"
  set -- $state
  printf 'ActiveState=%s\nSubState=%s\nResult=%s\nExecMainStatus=%s\n' "$@"
  ;;
reset-failed) grep -q ^failed "$unit/state" && rm "$unit/state" ;;
reboot)
  rm -f "$unit/state"
  tr 0-8 1-9 <"$FAKE_ROOT/proc/sys/kernel/random/boot_id" >"$unit/boot_id"
  mv "$unit/boot_id" "$FAKE_ROOT/proc/sys/kernel/random/boot_id"
  if [ -e "$FAKE_ROOT/nixos" ]; then
    mkdir -p "$FAKE_ROOT/run/current-system"
    echo 25.11 >"$FAKE_ROOT/run/current-system/nixos-version"
  fi
  [ ! -e "$unit/dies" ] || kill $$
  ;;
*) echo "$*" >>"$0.log" ;;
esac`)
}

// reboot gives the machine another boot id.
func (h *Host) reboot(t testing.TB) {
	id := make([]byte, 16)
	rand.Read(id)
	must(t, os.WriteFile(h.Path("/proc/sys/kernel/random/boot_id"), []byte(hex.EncodeToString(id)+"\n"), 0o644))
}

// NixOS has the machine run NixOS.
func (h *Host) NixOS(t testing.TB) {
	must(t, os.MkdirAll(h.Path("/run/current-system"), 0o755))
	must(t, os.WriteFile(h.Path("/run/current-system/nixos-version"), []byte("25.11\n"), 0o644))
}

// ListensAt has the machine's sshd say that it listens at these ports.
func (h *Host) ListensAt(t testing.TB, ports ...string) {
	h.script(t, "sshd", `printf 'port %s\n' `+strings.Join(ports, " "))
}

// FixedAddress gives the machine an address that is not from DHCP, on its interface of that number.
func (h *Host) FixedAddress(t testing.TB, device string, index int) {
	h.script(t, "ip", `
case "$*" in
"-4 route show default") echo "default via 192.0.2.1 dev `+device+` proto static" ;;
"-4 -o address show dev `+device+` scope global") echo "`+strconv.Itoa(index)+`: `+device+`    inet 192.0.2.9/24 brd 192.0.2.255 scope global `+device+`\       valid_lft forever preferred_lft forever" ;;
*) exit 1 ;;
esac`)
	must(t, os.MkdirAll(h.Path("/sys/class/net/"+device), 0o755))
	must(t, os.WriteFile(h.Path("/sys/class/net/"+device+"/ifindex"), []byte(strconv.Itoa(index)+"\n"), 0o644))
}

// TmpInMemory has the machine's /tmp be in memory.
func (h *Host) TmpInMemory(t testing.TB) { h.script(t, "stat", `echo tmpfs`) }

// DiesOfReboot has the systemctl that boots the machine be killed by that.
func (h *Host) DiesOfReboot() { os.WriteFile(h.Path("/unit/dies"), nil, 0o600) }

// Firewall gives the machine NixOS's firewall, which notes what it is told. It knows of IPv4 only.
func (h *Host) Firewall(t testing.TB) {
	h.script(t, "iptables", `
case "$*" in
*-C*) exit 1 ;;
*-I*) echo "$*" >>"$FAKE_ROOT/firewall" ;;
esac`)
}

// Opened is what the firewall was told to let through, a line each.
func (h *Host) Opened() []string {
	data, _ := os.ReadFile(h.Path("/firewall"))
	return strings.Split(strings.TrimSpace(string(data)), "\n")
}

// Asked is what systemd-run was asked, a line each.
func (h *Host) Asked() []string {
	data, _ := os.ReadFile(h.Path("/unit/asked"))
	return strings.Split(strings.TrimSpace(string(data)), "\n")
}

// NoSudo has sudo refuse with a text.
func (h *Host) NoSudo(t testing.TB, text string) {
	h.script(t, "sudo", `echo "`+text+`" >&2; exit 1`)
}

func (h *Host) lets(user string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.users == nil || slices.Contains(h.users, user)
}

// LetOnly says who may log in from now on.
func (h *Host) LetOnly(users ...string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.users = users
}

// forward joins a channel with another machine, for those who go through this one.
func (h *Host) forward(c ssh.NewChannel) {
	var to struct {
		Host     string
		Port     uint32
		From     string
		FromPort uint32
	}
	if err := ssh.Unmarshal(c.ExtraData(), &to); err != nil {
		c.Reject(ssh.ConnectionFailed, "no address")
		return
	}
	address := net.JoinHostPort(to.Host, strconv.Itoa(int(to.Port)))
	h.mu.Lock()
	h.forwarded = append(h.forwarded, address)
	h.mu.Unlock()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		c.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	defer conn.Close()
	channel, requests, err := c.Accept()
	if err != nil {
		return
	}
	defer channel.Close()
	go ssh.DiscardRequests(requests)
	go func() { io.Copy(conn, channel); conn.Close() }()
	io.Copy(channel, conn)
}

// Forwarded are the addresses that others went to through this machine.
func (h *Host) Forwarded() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.forwarded)
}
