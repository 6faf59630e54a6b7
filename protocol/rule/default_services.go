package rule

import (
	"slices"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	unitPattern = `[A-Za-z0-9_*?\[][A-Za-z0-9_.@:\\*?\[\]-]{0,254}` // of units, with * and ? as systemd has them
	unitName    = `[A-Za-z0-9_][A-Za-z0-9_.:-]*(@[A-Za-z0-9_.:-]+)?`

	// Units that are not an operator's: what would cut the node off, is systemd's own, opens a door or stops the machine,
	// what changes the whole system, and all kinds but services, timers, sockets and paths.
	notOperators = `(nix-infra|nixos-|dbus|systemd-|initrd-|(debug|console|container)-shell|emergency|rescue|halt|reboot|poweroff|kexec).*|` +
		`.*\.(target|mount|automount|swap|slice|scope|device|snapshot)`

	outputModes = `short|short-full|short-iso|short-iso-precise|short-precise|short-monotonic|short-unix|short-delta|with-unit|verbose|json|json-pretty|json-sse|json-seq|cat|export`
)

var elsewhere = []Denied{
	denied("it reaches another machine", "-H --host"),
	denied("it reaches into a container", "-M --machine"),
	denied("it reads another system's files", "--root --image --image-policy"),
	denied("a command has no user's session", "--user --global"),
}

func serviceRules() []Rule {
	journal := []string{"systemd-journal"}
	return []Rule{
		{
			Name: "systemctl", Program: "systemctl", Role: protocol.Viewer, Groups: journal, Defaults: []string{"--no-pager"},
			Forms: []Form{
				{},
				words("status|show|cat|is-active|is-enabled|is-failed|list-dependencies", operands(0, 64, "a unit", unitPattern, "")),
				words("list-units|list-unit-files|list-timers|list-sockets|list-automounts|list-paths", operands(0, 64, "a unit", unitPattern, "")),
				words("list-jobs|list-machines|is-system-running|get-default|show-environment"),
			},
			Options: slices.Concat(
				flags("-a --all", "-l --full", "-r --recursive", "--reverse", "--after", "--before", "--plain", "--no-legend", "--no-pager", "-q --quiet",
					"--value", "--failed", "--show-types", "--with-dependencies", "--no-warn"),
				many(value(list, "-t --type", "--state", "-p --property", "-P")),
				value(number, "-n --lines"), value(outputModes, "-o --output"), value(list, "--timestamp"), value("true|false|yes|no", "--legend"),
			),
			Denied: slices.Concat(elsewhere, []Denied{
				denied("it runs a pager for the manual", "help"),
				denied("it runs an editor", "edit"),
				denied("it changes which units there are; a deployment does that", "enable disable reenable preset preset-all mask unmask link revert add-wants "+
					"add-requires set-default set-property daemon-reload daemon-reexec bind mount-image"),
				denied("signals can stop anything; an operator may stop and restart units", "kill clean freeze thaw"),
				denied("it stops the machine, or most of it", "isolate default rescue emergency halt poweroff reboot soft-reboot kexec exit switch-root suspend "+
					"hibernate hybrid-sleep suspend-then-hibernate sleep"),
				denied("it changes the service manager", "cancel import-environment set-environment unset-environment log-level log-target service-watchdogs service-log-level "+
					"service-log-target"),
			}),
		},
		{
			Name: "systemctl control", Program: "systemctl", Role: protocol.Operator, User: "root", Timeout: 600, Defaults: []string{"--no-ask-password"},
			Forms: []Form{words("start|stop|restart|try-restart|reload|reload-or-restart|try-reload-or-restart|reset-failed",
				operands(1, 16, "a service, timer, socket or path unit, and none of nix-infra's, NixOS's, systemd's or D-Bus's own", unitName, notOperators))},
			Options: flags("--no-ask-password", "--no-block", "-q --quiet", "--no-warn"),
			Denied:  elsewhere,
		},
		{
			Name: "journalctl", Program: "journalctl", Role: protocol.Viewer, Groups: journal, Timeout: 3600, Output: 64 << 20, Defaults: []string{"--no-pager"},
			Forms: []Form{{Operands: []Operand{operands(0, 32, "a match: FIELD=value or +", `[A-Z_][A-Z0-9_]{0,63}=.{0,200}|\+`, "")}}},
			Options: slices.Concat(
				flags("-r --reverse", "-f --follow", "-e --pager-end", "-a --all", "-q --quiet", "--no-tail", "--no-hostname", "--no-full", "-l --full", "-m --merge",
					"-k --dmesg", "--system", "--show-cursor", "--list-boots", "--disk-usage", "--header", "-N --fields", "-x --catalog", "--utc", "--no-pager"),
				many(value(unitPattern, "-u --unit", "--user-unit")),
				many(value(anyText, "-t --identifier", "-T --exclude-identifier")),
				value(`[0-7a-z]+(\.\.[0-7a-z]+)?`, "-p --priority"), value(list, "--facility", "--output-fields"),
				value(anyText, "-g --grep"), optional(value("true|false|yes|no", "--case-sensitive")),
				value(when, "-S --since", "-U --until"),
				loose(value(`[+-]?[0-9]{1,5}|[0-9a-f]{32}([+-][0-9]{1,5})?|all`, "-b --boot")), loose(value(`\+?[0-9]{1,7}|all`, "-n --lines")),
				value(outputModes, "-o --output"),
				value(`[a-z0-9=;-]{1,512}`, "-c --cursor", "--after-cursor"), value(`[A-Z_][A-Z0-9_]{0,63}`, "-F --field"),
			),
			Denied: []Denied{
				denied("it reads journals that are not the node's own", "-D --directory -i --file --root --image --image-policy -M --machine --namespace"),
				denied("it writes a file", "--cursor-file"),
				denied("it deletes logs", "--vacuum-size --vacuum-time --vacuum-files"),
				denied("it changes what journald does", "--rotate --flush --sync --relinquish-var --smart-relinquish-var --synchronize-on-exit"),
				denied("it makes or takes keys", "--setup-keys --force --interval --verify-key"),
				denied("it writes the catalog", "--update-catalog"),
			},
		},
		{
			Name: "dmesg", Program: "dmesg", Role: protocol.Viewer, User: "root", Timeout: 3600, Defaults: []string{"--nopager"},
			Options: slices.Concat(
				flags("-T --ctime", "-k --kernel", "-u --userspace", "-x --decode", "-r --raw", "-t --notime", "-d --show-delta", "-e --reltime", "-w --follow", "-W --follow-new",
					"-J --json", "-P --nopager", "-p --force-prefix"),
				value(list, "-l --level", "-f --facility"), value("delta|reltime|ctime|notime|iso|raw", "--time-format"), value(when, "--since", "--until"),
			),
			Denied: []Denied{
				denied("it deletes the kernel's log", "-C --clear -c --read-clear"),
				denied("it changes what the kernel prints", "-n --console-level -D --console-off -E --console-on"),
				denied("it reads another file", "-F --file -K --kmsg-file"),
				denied("it runs a pager; -T prints times for people", "-H --human"),
			},
		},
		{
			Name: "systemd-analyze", Program: "systemd-analyze", Role: protocol.Viewer, Defaults: []string{"--no-pager"},
			Forms:   []Form{{}, words("time|blame"), words("critical-chain|security", operands(0, 16, "a unit", unitPattern, ""))},
			Options: flags("--no-pager"),
			Denied:  elsewhere,
		},
		{
			Name: "systemd-cgls", Program: "systemd-cgls", Role: protocol.Viewer, Defaults: []string{"--no-pager"},
			Options: flags("-a --all", "-l --full", "-k", "--no-pager"), Denied: elsewhere,
		},
		{
			Name: "loginctl", Program: "loginctl", Role: protocol.Viewer, Defaults: []string{"--no-pager"},
			Forms: []Form{{}, words("list-sessions|list-users|list-seats")}, Options: flags("--no-pager", "--no-legend"), Denied: elsewhere,
		},
		{
			Name: "timedatectl", Program: "timedatectl", Role: protocol.Viewer, Defaults: []string{"--no-pager"},
			Forms:   []Form{{}, words("status|show|timesync-status|show-timesync")},
			Options: slices.Concat(flags("-a --all", "--no-pager", "--value"), many(value(list, "-p --property"))),
			Denied: slices.Concat(elsewhere, []Denied{denied("it changes the clock; a deployment does that",
				"set-time set-timezone set-local-rtc set-ntp ntp-servers revert --adjust-system-clock --monitor")}),
		},
		{
			Name: "hostnamectl", Program: "hostnamectl", Role: protocol.Viewer,
			Forms:   []Form{{}, words("status|hostname|icon-name|chassis|deployment|location")},
			Options: slices.Concat(flags("--static", "--transient", "--pretty", "-j"), value("short|pretty|off", "--json")),
			Denied: slices.Concat(elsewhere, []Denied{denied("it changes the node's name; a deployment does that",
				"set-hostname set-icon-name set-chassis set-deployment set-location")}),
		},
		{
			Name: "networkctl", Program: "networkctl", Role: protocol.Viewer, Defaults: []string{"--no-pager"},
			Forms:   []Form{{}, words("list|status|lldp", operands(0, 16, "an interface", iface, ""))},
			Options: slices.Concat(flags("-a --all", "-l --full", "-s --stats", "--no-pager", "--no-legend"), value(number, "-n --lines"), value("short|pretty|off", "--json")),
			Denied:  elsewhere,
		},
		{
			Name: "resolvectl", Program: "resolvectl", Role: protocol.Viewer, Defaults: []string{"--no-pager"},
			Forms: []Form{{}, words("status", operands(0, 16, "an interface", iface, "")), words("statistics"), words("query", operands(1, 8, "a name", host, ""))},
			Options: slices.Concat(flags("-4", "-6", "--no-pager"), value("[A-Za-z0-9]+", "-t --type", "-c --class"), value(iface, "-i --interface"),
				value("true|false|yes|no", "--legend", "--cname", "--search", "--cache")),
			Denied: elsewhere,
		},
		{
			Name: "coredumpctl", Program: "coredumpctl", Role: protocol.Viewer, Groups: journal, Defaults: []string{"--no-pager"},
			Forms:   []Form{{}, words("list", operands(0, 8, "a pid or program", name, ""))},
			Options: slices.Concat(flags("--no-pager", "--no-legend", "-r --reverse", "-1"), value(number, "-n"), value(when, "-S --since", "-U --until"), value("short|pretty|off", "--json")),
			Denied: []Denied{denied("it runs a debugger", "debug gdb --debugger"), denied("it hands out the memory of programs, with their secrets", "dump info -o --output"),
				denied("it reads journals that are not the node's own", "-D --directory --file --root --image -M --machine")},
		},
	}
}
