package rule

import "slices"

// networkRules tell how the machine is connected, and what it is connected to.
func networkRules() []Rule {
	ping := viewer("ping", slices.Concat(
		flags("-4", "-6", "-n", "-q", "-D", "-O", "-v"), value("[1-9][0-9]?|100", "-c"), value(`[1-9][0-9]?|0\.[2-9]`, "-i"), value("[1-9][0-9]{0,2}", "-w", "-W", "-t"),
		value("[0-9]{1,4}", "-s"), value(iface, "-I"), value("do|dont|want|probe", "-M")), operands(1, 1, "a host", host, ""))
	ping.Defaults, ping.Timeout = []string{"-c4"}, 300
	ping.Denied = []Denied{denied("it floods the network", "-f -l -A"), denied("it pings everybody", "-b"), denied("it goes on for ever", "-a -d -m -R -Q -T")}
	traceroute := viewer("traceroute", slices.Concat(flags("-4", "-6", "-n"), value("[1-9][0-9]?", "-m", "-q", "-w", "-f"), value("[0-9]{1,5}", "-p")),
		operands(1, 1, "a host", host, ""))
	traceroute.Timeout = 300
	tracepath := viewer("tracepath", slices.Concat(flags("-4", "-6", "-n", "-b"), value("[1-9][0-9]?", "-m")), operands(1, 1, "a host", host, ""))
	tracepath.Timeout = 300
	dig := viewer("dig", slices.Concat(flags("-4", "-6", "-u"), value(host, "-x", "-q"), value("[A-Za-z0-9]+", "-t", "-c"), value("[0-9]{1,5}", "-p")),
		operands(0, 16, "a name, a type, @server, or +option (none that reads files or speaks HTTPS)",
			`@`+host+`|\+[a-z0-9]+(=[A-Za-z0-9.:,-]+)?|[A-Za-z0-9_*.][A-Za-z0-9_*./-]*`, `\+(https|tls|proxy|ednsopt|dnscrypt).*`))
	dig.Denied = []Denied{denied("it reads another file", "-f -k"), denied("it takes keys", "-y")}
	arp := viewer("arp", slices.Concat(flags("-a", "-e", "-n --numeric", "-v --verbose"), value(iface, "-i --device")), operands(0, 1, "a host", host, ""))
	arp.Denied = []Denied{denied("it changes the table", "-d --delete -s --set -f --file -D --use-device")}
	netstat := viewer("netstat", flags("-4 --inet", "-6 --inet6", "-a --all", "-e --extend", "-g --groups", "-i --interfaces", "-l --listening", "-n --numeric", "-o --timers", "-p --programs",
		"-r --route", "-s --statistics", "-t --tcp", "-u --udp", "-v --verbose", "-w --raw", "-W --wide", "-x --unix"))
	netstat.User = "root" // -p
	return []Rule{
		ipRule(),
		ssRule(),
		netstat,
		ping,
		traceroute,
		tracepath,
		dig,
		viewer("nslookup", nil, operands(1, 1, "a name", host, ""), operands(0, 1, "a server", host, "")),
		viewer("host", slices.Concat(flags("-4", "-6", "-a", "-v", "-T"), value("[A-Za-z0-9]+", "-t", "-c")), operands(1, 2, "a name, or a server", host, "")),
		arp,
		iptablesRule("iptables"),
		iptablesRule("ip6tables"),
		nftRule(),
		wgRule(),
	}
}

// ipRule has ip's verbs that show. ip takes any beginning of a word for the word: here are those that people type.
func ipRule() Rule {
	filter := operands(0, 16, "a filter", `[A-Za-z0-9][A-Za-z0-9_.:/@%-]*`, "")
	r := viewer("ip", flags("-4", "-6", "-0", "-s -stats -statistics", "-d -details", "-br -brief", "-j -json", "-p -pretty", "-o -oneline", "-c -color", "-h -human -human-readable",
		"-r -resolve", "-N -Numeric", "-t -timestamp"))
	r.Options = append(r.Options, value("inet|inet6|link|bridge|mpls", "-f -family")...)
	const objects = "address|addr|a|link|l|route|r|neighbour|neighbor|neigh|n|rule|ru|maddress|maddr|m|tunnel|ntable|vrf|nexthop"
	r.Style = Words
	r.Forms = []Form{
		{Words: []string{objects}},
		{Words: []string{objects, "show|list|ls|lst"}, Operands: []Operand{filter}},
		{Words: []string{"route|r", "get"}, Operands: []Operand{operands(1, 16, "an address, or what it is looked up with", filter.Pattern, "")}},
		{Words: []string{"monitor"}, Operands: []Operand{operands(0, 8, "a kind of object", "all|address|link|route|neigh|rule|mroute|nexthop", "")}},
	}
	r.Denied = []Denied{
		denied("it reads commands from a file", "-b -batch -B -force"), denied("it goes into another network", "-n -netns -a -all"), denied("it runs other programs", "netns exec"),
		denied("it changes the network", "add del delete change replace set flush append prepend restore save up down"), denied("it shows keys", "xfrm macsec"),
	}
	return r
}

func ssRule() Rule {
	r := viewer("ss", slices.Concat(
		flags("-4 --ipv4", "-6 --ipv6", "-0 --packet", "-a --all", "-e --extended", "-H --no-header", "-i --info", "-l --listening", "-m --memory", "-M --mptcp", "-n --numeric", "-o --options",
			"-O --oneline", "-p --processes", "-r --resolve", "-s --summary", "-S --sctp", "-t --tcp", "-T --threads", "-u --udp", "-w --raw", "-x --unix", "-Z --context", "--cgroup", "--vsock",
			"-B --bound-inactive"),
		value("inet|inet6|unix|link|netlink|vsock|tipc|xdp", "-f --family"), value(list, "-A --query --socket")),
		operands(0, 32, "a filter", `[A-Za-z0-9=!<>:.*\[(][A-Za-z0-9=!<>:.,*/()\[\]%_ -]*|\)`, ""))
	r.User = "root" // -p
	r.Denied = []Denied{denied("it closes other people's connections", "-K --kill"), denied("it writes a file", "-D --diag"), denied("it reads another file", "-F --filter"),
		denied("it goes into another network", "-N --net"), denied("it goes on for ever", "-E --events")}
	return r
}

// iptablesRule lists; nothing else is an option.
func iptablesRule(program string) Rule {
	r := viewer(program, slices.Concat(
		flags("-n --numeric", "-v --verbose", "-x --exact", "--line-numbers"), loose(value("[A-Za-z0-9_][A-Za-z0-9_-]{1,28}", "-L --list", "-S --list-rules")),
		value("filter|nat|mangle|raw|security", "-t --table"), optional(value("[0-9]", "-w --wait"))))
	r.Defaults, r.User = []string{"-w5"}, "root"
	r.Denied = []Denied{
		denied("it changes the rules", "-A --append -C --check -D --delete -I --insert -R --replace -F --flush -Z --zero -N --new-chain -X --delete-chain -P --policy -E --rename-chain"),
		denied("it runs another program", "-M --modprobe"),
	}
	return r
}

func nftRule() Rule {
	const family = "ip|ip6|inet|arp|bridge|netdev"
	object := operands(1, 1, "a name", "[A-Za-z_][A-Za-z0-9_.-]*", "")
	r := viewer("nft", flags("-a --handle", "-j --json", "-n --numeric", "-s --stateless", "-y --numeric-priority", "-t --terse"))
	r.Forms = []Form{
		{Words: []string{"list", "ruleset|tables|chains|sets|maps|counters"}, Operands: []Operand{operands(0, 1, "a family", family, "")}},
		{Words: []string{"list", "table", family}, Operands: []Operand{object}},
		{Words: []string{"list", "chain|set|map", family}, Operands: []Operand{object, object}},
	}
	r.User = "root"
	r.Denied = []Denied{denied("it reads commands from a file", "-f --file -I --includepath -D --define -i --interactive"),
		denied("it changes the rules", "add create insert replace delete destroy flush rename reset import")}
	return r
}

// wgRule shows the state of tunnels; wg hides private keys in it, but not in its other forms.
func wgRule() Rule {
	r := viewer("wg", nil)
	r.Forms = []Form{
		{},
		words("show", operands(0, 1, "an interface", iface, ""),
			operands(0, 1, "a value that is no key", "public-key|listen-port|fwmark|peers|endpoints|allowed-ips|latest-handshakes|transfer|persistent-keepalive", "")),
	}
	r.User = "root"
	r.Denied = []Denied{denied("it shows keys", "showconf dump private-key preshared-keys genkey genpsk"), denied("it changes the tunnels", "set setconf addconf syncconf")}
	return r
}
