package rule

import (
	"slices"

	"github.com/nix-infra/nix-infra/protocol"
)

// systemRules tell what the machine is, and who is on it.
func systemRules() []Rule {
	user := operands(0, 1, "a user's name", name, "")
	last := viewer("last", slices.Concat(
		flags("-a --hostlast", "-F --fulltimes", "-i --ip", "-R --nohostname", "-w --fullnames", "-x --system"),
		value(number, "-n --limit"), value(when, "-s --since", "-t --until", "-p --present"), value("notime|short|full|iso", "--time-format")),
		operands(0, 8, "a user or terminal", name, ""))
	last.Denied = []Denied{denied("it reads another file", "-f --file"), numbered}
	date := viewer("date", slices.Concat(flags("-u --utc --universal", "-R --rfc-email"), value(when, "-d --date"),
		optional(value("date|hours|minutes|seconds|ns", "-I --iso-8601")), value("date|seconds|ns", "--rfc-3339")),
		operands(0, 1, "a format that begins with +", `\+.{0,200}`, ""))
	date.Denied = []Denied{denied("it sets the clock", "-s --set"), denied("it reads another file", "-f --file -r --reference")}
	hostname := viewer("hostname", flags("-f --fqdn --long", "-i --ip-address", "-I --all-ip-addresses", "-s --short", "-d --domain"))
	hostname.Denied = []Denied{denied("it sets the node's name", "-F --file -b --boot")}
	env := viewer("env", nil) // with an operand it would run a program
	return []Rule{
		viewer("uname", flags("-a --all", "-s --kernel-name", "-n --nodename", "-r --kernel-release", "-v --kernel-version", "-m --machine", "-p --processor",
			"-i --hardware-platform", "-o --operating-system")),
		viewer("uptime", flags("-p --pretty", "-s --since")),
		viewer("who", flags("-a --all", "-b --boot", "-d --dead", "-H --heading", "-l --login", "-m", "-p --process", "-q --count", "-r --runlevel", "-s --short", "-t --time",
			"-T -w --mesg", "-u --users")),
		viewer("w", flags("-h --no-header", "-u --no-current", "-s --short", "-f --from", "-o --old-style", "-i --ip-addr", "-p --pids"), user),
		last,
		viewer("id", flags("-u --user", "-g --group", "-G --groups", "-n --name", "-r --real"), user),
		viewer("whoami", nil),
		viewer("groups", nil, user),
		viewer("nproc", slices.Concat(flags("--all"), value(number, "--ignore"))),
		hostname,
		date,
		env,
		viewer("printenv", nil, operands(0, 16, "a variable's name", `[A-Za-z_][A-Za-z0-9_]*`, "")),
		viewer("echo", flags("-n", "-e", "-E"), operands(0, 64, "a text"+notDash, `[^-].*`, "")),
		{
			Name: "getent", Program: "getent", Role: protocol.Viewer,
			Forms: []Form{words("passwd|group|hosts|ahosts|ahostsv4|ahostsv6|services|protocols|networks", operands(0, 8, "a key", host, ""))},
		},
	}
}

// numbered is -5 and the like, where a program has them, which would be read digit by digit.
var numbered = denied("a number of its own is an old spelling: give it to -n", "-0 -1 -2 -3 -4 -5 -6 -7 -8 -9")

// processRules tell what runs, and what it takes of processors and memory.
func processRules() []Rule {
	interval := []Operand{operands(0, 2, "a number: seconds, then how many times", `[0-9]{1,5}`, "")}
	ps := viewer("ps", slices.Concat(
		flags("-e -A", "-a", "-d", "-f", "-F", "-l", "-L", "-H", "-j", "-M", "-T", "-w", "-y", "-N --deselect", "--forest", "--no-headers --no-heading", "--headers"),
		many(value(`[A-Za-z_%][A-Za-z0-9_%,=: ]*`, "-o --format", "-O")),
		many(value(`[0-9][0-9, ]*`, "-p --pid", "-q --quick-pid", "--ppid", "-s --sid")), many(value(list, "-C", "-u -U --user --User", "-g -G --group --Group", "-t --tty")),
		value(`[+-]?[A-Za-z_%][A-Za-z0-9_%,+-]*`, "--sort"), value(number, "--cols --columns --width", "--rows --lines")),
		operands(0, 1, "letters as in ps aux", `[acefhjlmnrsuvwxLSTX]{1,16}`, ""), operands(0, 32, "a pid", number, ""))
	top := viewer("top", slices.Concat(
		flags("-b --batch-mode", "-H --threads-show", "-i --idle-toggle", "-c --cmdline-toggle", "-S --accum-time-toggle", "-1 --single-cpu-toggle"),
		value("[1-9]|10", "-n --iterations"), value(duration, "-d --delay"), value(`[+-]?[A-Za-z%]+`, "-o --sort-override"), value("[0-9]{1,3}", "-w --width"),
		value(list, "-u --filter-any-user", "-U --filter-only-euser"), value(`[0-9][0-9,]*`, "-p --pid"), value("[kmgtpe]", "-e --scale-task-mem", "-E --scale-summary-mem")))
	top.Defaults = []string{"-b", "-n1"}
	sar := viewer("sar", slices.Concat(
		flags("-A", "-b", "-B", "-d", "-h", "-H", "-p", "-q", "-r", "-S", "-u", "-v", "-w", "-W", "-y", "-z", "--human", "--pretty"),
		value(list, "-n", "-I"), value(cpuList, "-P"), value(`[0-9]{2}:[0-9]{2}(:[0-9]{2})?`, "-s", "-e"), value("[0-9]{1,5}", "-i")), interval...)
	sar.Denied = []Denied{denied("it writes a file", "-o"), denied("it reads another file", "-f")}
	pgrep := viewer("pgrep", slices.Concat(
		flags("-a --list-full", "-l --list-name", "-f --full", "-c --count", "-x --exact", "-v --inverse", "-n --newest", "-o --oldest", "-i --ignore-case", "-w --lightweight"),
		value(list, "-u --euid", "-U --uid", "-g --pgroup", "-G --group", "-P --parent", "-s --session", "-t --terminal"), value(`[^-]`, "-d --delimiter")),
		operands(0, 1, "a pattern"+notDash, anyText, ""))
	pgrep.Denied = []Denied{denied("it sends a signal, or reads another file", "--signal -F --pidfile -L --logpidfile")}
	return []Rule{
		ps,
		top,
		pgrep,
		viewer("pidof", flags("-s", "-x"), operands(1, 8, "a program's name", name, "")),
		viewer("pstree", slices.Concat(flags("-a --arguments", "-A --ascii", "-c --compact-not", "-g --show-pgids", "-l --long", "-n --numeric-sort", "-p --show-pids",
			"-s --show-parents", "-t --thread-names", "-T --hide-threads", "-u --uid-changes", "-U --unicode"), value(number, "-H --highlight-pid")),
			operands(0, 1, "a pid or user", name, "")),
		viewer("free", slices.Concat(flags("-b --bytes", "-k --kibi", "-m --mebi", "-g --gibi", "--kilo", "--mega", "--giga", "-h --human", "-w --wide", "-t --total", "-l --lohi",
			"-v --committed", "--si"), value(duration, "-s --seconds"), value("[0-9]{1,4}", "-c --count"))),
		viewer("vmstat", slices.Concat(flags("-a --active", "-f --forks", "-n --one-header", "-s --stats", "-d --disk", "-D --disk-sum", "-w --wide", "-t --timestamp"),
			value("[kKmM]", "-S --unit"), value(name, "-p --partition")), interval...),
		viewer("iostat", slices.Concat(flags("-c", "-d", "-h", "-k", "-m", "-N", "-s", "-t", "-x", "-y", "-z", "--human", "--pretty", "--compact"), value("JSON", "-o"),
			value("[0-2]", "--dec")), operands(0, 16, "a device's name", `[a-z][A-Za-z0-9_-]*`, ""), interval[0]),
		viewer("mpstat", slices.Concat(flags("-A", "-u", "-n"), value(cpuList, "-P"), value("SUM|CPU|SCPU|ALL", "-I"), value("JSON", "-o")), interval...),
		sar,
	}
}

// hardwareRules tell what the machine is made of.
func hardwareRules() []Rule {
	sysroot := denied("it reads another system's files", "-s --sysroot")
	lscpu := viewer("lscpu", slices.Concat(flags("-a --all", "-b --online", "-B --bytes", "-c --offline", "-J --json", "-x --hex", "-y --physical", "--output-all"),
		optional(value(list, "-C --caches", "-e --extended", "-p --parse"))))
	lscpu.Denied = []Denied{sysroot}
	lsmem := viewer("lsmem", slices.Concat(flags("-a --all", "-b --bytes", "-J --json", "-n --noheadings", "-P --pairs", "-r --raw", "--output-all"), value(list, "-o --output", "-S --split"),
		value("never|always|only", "--summary")))
	lsmem.Denied = []Denied{sysroot}
	lspci := viewer("lspci", slices.Concat(flags("-v", "-n", "-k", "-t", "-m", "-D"), value(`[0-9a-fA-F:.*]+`, "-s", "-d")))
	lspci.Denied = []Denied{denied("it reads another file", "-i -p -F"),
		denied("it touches the bus in a way that can stop the machine", "-M -H -A -O"), denied("it asks other machines", "-q -Q")}
	lsusb := viewer("lsusb", slices.Concat(flags("-v --verbose", "-t --tree"), value(`[0-9a-fA-F:]+`, "-s", "-d")))
	lsusb.User = "root" // the others see no devices
	lsusb.Denied = []Denied{denied("it reads another file", "-D")}
	lshw := viewer("lshw", slices.Concat(flags("-short", "-businfo", "-json", "-xml", "-html", "-quiet", "-sanitize", "-numeric", "-notime"), many(value(`[a-z]+`, "-C -class -c"))))
	lshw.Style, lshw.User = Words, "root"
	lshw.Denied = []Denied{denied("it writes a file", "-dump"), denied("it opens a window", "-X"), denied("it changes what is probed", "-enable -disable")}
	dmidecode := viewer("dmidecode", slices.Concat(flags("-q --quiet"), many(value(`[a-z0-9, ]+`, "-t --type")), value(`[a-z][a-z0-9-]*`, "-s --string")))
	dmidecode.User = "root"
	dmidecode.Denied = []Denied{denied("it writes a file", "--dump-bin"), denied("it reads another file, or memory", "--from-dump -d --dev-mem --no-sysfs")}
	sensors := viewer("sensors", flags("-A --no-adapter", "-f --fahrenheit", "-u", "-j"), operands(0, 8, "a chip's name", `[a-z0-9_*-]+`, ""))
	sensors.Denied = []Denied{denied("it changes the chips", "-s --set"), denied("it reads another file", "-c --config-file")}
	return []Rule{lscpu, lsmem, lspci, lsusb, lshw, dmidecode, sensors}
}
