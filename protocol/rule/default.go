package rule

import (
	"slices"
	"strings"

	"github.com/nix-infra/nix-infra/protocol"
)

// Default returns the rules that every node has unless its policy says otherwise: what viewers may ask a machine, what
// operators may do to its units, and what admins may write for the cluster. All of it has been held against the manual of
// the program: nothing in it runs another program, writes a file, reads commands from one, waits for a keyboard, or reaches
// another machine but to look something up. Most run as a user of their own that may nothing; those that tell nothing to
// such a user run as root, and their grammar is the narrower for it.
func Default() []Rule {
	return slices.Concat(serviceRules(), systemRules(), processRules(), diskRules(), fileRules(), networkRules(), hardwareRules(), nixRules(), clusterRules())
}

// Patterns that more than one rule has.
const (
	number   = `[0-9]{1,9}`
	duration = `[0-9]{1,5}(\.[0-9]{1,3})?`      // seconds
	list     = `[A-Za-z0-9_][A-Za-z0-9_,.:+-]*` // of names, with commas
	name     = `[A-Za-z0-9_][A-Za-z0-9_.@-]*`   // of a user, process or device
	anyText  = `[^-].{0,499}`
	notDash  = " that does not begin with -"
	cpuList  = `ALL|ON|[0-9]{1,4}([,-][0-9]{1,4})*`
	when     = `([A-Za-z0-9@+]|-[0-9])[A-Za-z0-9:+. @/-]{0,63}` // a time, or how long ago as in -5m

	host  = `[A-Za-z0-9_]([A-Za-z0-9_.:%-]*[A-Za-z0-9_.])?` // a name, or an address of either kind
	iface = `[A-Za-z0-9][A-Za-z0-9_.:@-]{0,31}`

	// A file is named from / on, without . and .., and is not a device.
	filePath = `/|(/[^/]+)+/?`
	notFile  = `(.*/)?\.{1,2}(/.*)?|/dev(/.*)?`
	notDots  = `(.*/)?\.{1,2}(/.*)?`
)

// flags are options without a value. Each argument has all spellings of one.
func flags(spelled ...string) []Option {
	options := value("", spelled...)
	return many(options)
}

// value are options with a value that is as the pattern says.
func value(pattern string, spelled ...string) []Option {
	options := make([]Option, len(spelled))
	for i, s := range spelled {
		options[i] = Option{Names: strings.Fields(s), Value: pattern}
	}
	return options
}

// many are options that may be given more than once.
func many(options []Option) []Option {
	for i := range options {
		options[i].Many = true
	}
	return options
}

// optional are options whose value may be left out.
func optional(options []Option) []Option {
	for i := range options {
		options[i].Optional = true
	}
	return options
}

// loose are options whose value may be left out, or be the next word.
func loose(options []Option) []Option {
	for i := range options {
		options[i].Optional, options[i].Loose = true, true
	}
	return options
}

// denied are options and words with the reason why there is no way to have them.
func denied(why, names string) Denied { return Denied{Names: strings.Fields(names), Why: why} }

// words is a form of subcommand words alone, with operands.
func words(subcommand string, operands ...Operand) Form {
	return Form{Words: strings.Fields(subcommand), Operands: operands}
}

func operands(least, most int, what, pattern, not string) Operand {
	return Operand{What: what, Pattern: pattern, Not: not, Min: least, Max: most}
}

// files are names of files, from / on.
func files(least int) Operand {
	return operands(least, 32, "a file's path: absolute, without . and .., not a device", filePath, notFile)
}

// paths are as files are, and may be of devices, too: of what is only asked about, and not read.
func paths(least int) Operand {
	return operands(least, 32, "a path: absolute, without . and ..", filePath, notDots)
}

// viewer makes a rule for viewers whose program has a single form.
func viewer(program string, options []Option, operands ...Operand) Rule {
	return Rule{Name: program, Program: program, Role: protocol.Viewer, Options: options, Forms: []Form{{Operands: operands}}}
}

// never says why programs that people ask for have no rule by default.
func never(program string) string {
	for _, n := range []struct{ programs, why string }{
		{"sh bash dash zsh fish ksh csh tcsh ash busybox rbash eval exec source", "a shell runs anything (docs/policy.md has allowShell, or make it the action of an app module)"},
		{"cd export set unset alias jobs fg bg ulimit type read test", "it is part of a shell, and there is none"},
		{"python python3 perl ruby node lua php awk gawk mawk", "an interpreter runs anything; make it the action of an app module"},
		{"env nice ionice nohup setsid timeout time watch xargs parallel stdbuf taskset chrt flock script screen tmux entr", "it runs other programs; name the program itself"},
		{"sudo su doas run0 pkexec chroot nsenter unshare systemd-run machinectl runuser capsh setpriv", "it runs other programs as somebody else, or elsewhere"},
		{"vi vim nvim nano emacs ed ex pico micro", "an editor writes, runs other programs, and needs a terminal; a deployment changes files"},
		{"less more most pg view man info", "a pager needs a terminal and runs other programs; output is paged where it arrives"},
		{"htop btop atop iotop iftop nethogs nload bmon mtr glances", "it needs a terminal (top has a rule: it prints once; so does nix-infra stats)"},
		{"strace ltrace perf gdb lldb bpftrace bpftool trace-cmd", "it runs other programs, or stops and reads the memory of those that run"},
		{"tcpdump tshark dumpcap ngrep", "it reads what others send, secrets too, and can run other programs"},
		{"ssh scp sftp rsync telnet nc ncat netcat socat ftp mosh", "it reaches other machines; nix-infra ssh, port-forward and upload go to this one"},
		{"curl wget", "it reaches whatever the node reaches, and writes files"},
		{"sed sort cut tr uniq tee column jq yq", "filter the output where it arrives: `nix-infra cmd` does that after a |"},
		{"rm mv cp dd ln mkdir rmdir touch truncate shred wipe install chmod chown chgrp chattr setfacl mkfs wipefs", "it writes; a deployment, an upload or an action changes files"},
		{"kill killall pkill", "signals can stop anything; systemctl stops and restarts units"},
		{"reboot shutdown halt poweroff init telinit kexec", "it stops the machine; nix-infra reboot does that, with a check afterwards"},
		{"passwd useradd userdel usermod groupadd groupdel chsh chfn visudo", "users come with a deployment"},
		{"nixos-rebuild nix-channel nixos-install switch-to-configuration", "nix-infra deploy and rollback do that, confirmed or reverted"},
		{"nix-collect-garbage", "nix-infra gc does that"},
		{"nix nix-build nix-shell nix-instantiate", "it builds and runs anything"},
		{"mysql mariadb psql sqlite3 redis-cli mongo mongosh", "a database's client can do anything to it, and run programs; make it the action of an app module"},
		{"docker nerdctl crictl kubectl", "it can start anything as root; podman has a rule that reads"},
		{"crontab at batch", "what runs later comes with a deployment"},
		{"umount swapon swapoff modprobe insmod rmmod sysctl parted cryptsetup lvm zfs zpool btrfs", "it changes the machine"},
	} {
		if slices.Contains(strings.Fields(n.programs), program) {
			return n.why
		}
	}
	return ""
}
