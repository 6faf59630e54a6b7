package rule

import "slices"

// diskRules tell what disks and file systems there are.
func diskRules() []Rule {
	disk := operands(0, 16, "a device: /dev/…", `/dev/[A-Za-z0-9_/:+.-]+`, notDots)
	df := viewer("df", slices.Concat(flags("-a --all", "-h --human-readable", "-H --si", "-i --inodes", "-k", "-l --local", "-P --portability", "-T --print-type", "--total"),
		many(value(name, "-t --type", "-x --exclude-type")), value(`[0-9]*[A-Za-z]{0,3}`, "-B --block-size"), optional(value(list, "--output"))),
		paths(0))
	du := viewer("du", slices.Concat(flags("-a --all", "-b --bytes", "-c --total", "-h --human-readable", "-k", "-m", "-s --summarize", "-S --separate-dirs", "-x --one-file-system",
		"--apparent-size", "--inodes", "--si"), value("[0-9]{1,3}", "-d --max-depth"), many(value(anyText, "--exclude")), value("[0-9]+[A-Za-z]{0,3}", "-t --threshold")), files(1))
	du.Timeout = 600
	lsblk := viewer("lsblk", slices.Concat(flags("-a --all", "-A --noempty", "-b --bytes", "-d --nodeps", "-D --discard", "-f --fs", "-i --ascii", "-J --json", "-l --list", "-m --perms",
		"-n --noheadings", "-O --output-all", "-p --paths", "-P --pairs", "-r --raw", "-s --inverse", "-S --scsi", "-N --nvme", "-t --topology", "-v --virtio", "-z --zoned"),
		value(list, "-o --output", "-x --sort", "-I --include", "-e --exclude")), disk)
	lsblk.User = "root" // the others see no devices
	lsblk.Denied = []Denied{denied("it reads another system's files", "--sysroot")}
	fdisk := viewer("fdisk", slices.Concat(flags("-l --list", "--bytes"), value(list, "-o --output")), disk)
	fdisk.User, fdisk.Defaults = "root", []string{"-l"} // without -l it would write
	mount := viewer("mount", slices.Concat(flags("-l --show-labels"), value(list, "-t --types")))
	mount.User = "root" // the others see their own mounts
	mount.Denied = []Denied{denied("it mounts; without an operand, mount lists what is mounted", "-a --all -o --options -B --bind -R --rbind -M --move -L --label -U --uuid --source --target")}
	findmnt := viewer("findmnt", slices.Concat(flags("-a --ascii", "-A --all", "-b --bytes", "-c --canonicalize", "-C --nocanonicalize", "-D --df", "-e --evaluate", "-f --first-only",
		"-i --invert", "-J --json", "-k --kernel", "-l --list", "-n --noheadings", "-P --pairs", "-r --raw", "-R --submounts", "-u --notruncate", "-U --uniq", "-v --nofsroot",
		"--output-all", "--real", "--pseudo", "--shadowed"), value(list, "-o --output", "-t --types", "-O --options"), value(filePath, "-T --target", "-M --mountpoint")),
		operands(0, 2, "a device or mount point", `/[A-Za-z0-9_/:+.@-]*`, notDots))
	findmnt.User = "root"
	findmnt.Denied = []Denied{denied("it reads another file", "-F --tab-file -N --task -s --fstab -m --mtab")}
	lsof := viewer("lsof", slices.Concat(flags("-n", "-P", "-t", "-U", "-a", "-R", "-l", "-w"),
		many(loose(value(`([46]|[46]?(TCP|UDP|tcp|udp)?(@[A-Za-z0-9.:\[\]-]+)?(:[A-Za-z0-9,-]+)?)`, "-i"))),
		many(value(`\^?[0-9][0-9,^]*`, "-p")), many(value(`\^?[A-Za-z0-9_][A-Za-z0-9_,^.-]*`, "-u")), many(value(name, "-c")), many(value(`(TCP|UDP):[A-Za-z_,^]+`, "-s"))), files(0))
	lsof.User = "root"
	lsof.Denied = []Denied{denied("it writes a file", "-D"), denied("it reads another file", "-k -m -A"), denied("it goes on for ever", "-r")}
	fuser := viewer("fuser", flags("-v --verbose", "-m --mount", "-u --user", "-a --all", "-4 --ipv4", "-6 --ipv6"),
		operands(1, 16, "a path, or a port as in 80/tcp", `[0-9]{1,5}/(tcp|udp)|`+filePath, notDots))
	fuser.User = "root"
	fuser.Denied = []Denied{denied("it kills", "-k --kill -i --interactive -w --writeonly")}
	return []Rule{df, du, lsblk, fdisk, mount, findmnt, lsof, fuser}
}

// fileRules tell what is in files and folders that everybody on the machine may read.
func fileRules() []Rule {
	head := viewer("head", slices.Concat(flags("-q --quiet --silent", "-v --verbose"), value(`-?[0-9]{1,9}[kKMG]?`, "-n --lines", "-c --bytes")), files(1))
	head.Denied = []Denied{numbered}
	tail := viewer("tail", slices.Concat(flags("-q --quiet --silent", "-v --verbose", "-f", "-F", "--retry"), value(`[+-]?[0-9]{1,9}[kKMG]?`, "-n --lines", "-c --bytes"),
		optional(value("name|descriptor", "--follow")), value(duration, "-s --sleep-interval"), value(number, "--pid")), files(1))
	tail.Timeout, tail.Denied = 3600, []Denied{numbered}
	wc := viewer("wc", flags("-c --bytes", "-m --chars", "-l --lines", "-L --max-line-length", "-w --words"), files(1))
	wc.Denied = []Denied{denied("it reads names from another file", "--files0-from")}
	file := viewer("file", flags("-b --brief", "-i --mime", "--mime-type", "--mime-encoding", "-L --dereference", "-h --no-dereference"), files(1))
	file.Denied = []Denied{denied("it writes a file", "-C --compile"), denied("it reads another file", "-f --files-from -m --magic-file"),
		denied("it opens devices, or runs other programs", "-s --special-files -z --uncompress -Z --uncompress-noreport -S --no-sandbox")}
	locate := viewer("locate", slices.Concat(flags("-b --basename", "-c --count", "-e --existing", "-i --ignore-case", "-w --wholename"), value(number, "-l --limit -n")),
		operands(1, 8, "a pattern"+notDash, anyText, ""))
	locate.Denied = []Denied{denied("it reads another database", "-d --database")}
	format := value(".{1,300}", "-c --format", "--printf")
	return []Rule{
		viewer("ls", slices.Concat(
			flags("-1", "-a --all", "-A --almost-all", "-B --ignore-backups", "-c", "-C", "-d --directory", "-F --classify", "-g", "-G --no-group", "-h --human-readable", "-H", "-i --inode",
				"-k", "-l", "-L --dereference", "-m", "-n --numeric-uid-gid", "-N --literal", "-o", "-p", "-q", "-Q --quote-name", "-r --reverse", "-R --recursive", "-s --size", "-S",
				"-t", "-u", "-U", "-v", "-x", "-X", "-Z --context", "--full-time", "--group-directories-first", "--si"),
			optional(value("never|always|auto", "--color")), value("none|size|time|version|extension|name|width", "--sort"),
			value("full-iso|long-iso|iso|locale", "--time-style"), value("atime|access|use|ctime|status|birth|creation|mtime|modification", "--time")), paths(0)),
		viewer("cat", flags("-A --show-all", "-b --number-nonblank", "-e", "-E --show-ends", "-n --number", "-s --squeeze-blank", "-t", "-T --show-tabs", "-v --show-nonprinting"), files(1)),
		head,
		tail,
		wc,
		grepRule(),
		findRule(),
		viewer("stat", slices.Concat(flags("-L --dereference", "-f --file-system", "-t --terse"), format), paths(1)),
		viewer("readlink", flags("-f --canonicalize", "-e --canonicalize-existing", "-m --canonicalize-missing", "-n --no-newline"), paths(1)),
		viewer("realpath", flags("-e --canonicalize-existing", "-m --canonicalize-missing", "-s --strip --no-symlinks"), paths(1)),
		viewer("sha256sum", flags("-b --binary", "-t --text"), files(1)),
		viewer("md5sum", flags("-b --binary", "-t --text"), files(1)),
		file,
		viewer("lsattr", flags("-R", "-a", "-d", "-l", "-p", "-v"), files(0)),
		viewer("which", flags("-a --all"), operands(1, 16, "a program's name", name, "")),
		viewer("whereis", flags("-b", "-m", "-s", "-u", "-l"), operands(0, 16, "a program's name", name, "")),
		locate,
	}
}

func grepRule() Rule {
	pattern := value(".{1,500}", "-e --regexp")
	r := viewer("grep", slices.Concat(
		flags("-a --text", "-c --count", "-E --extended-regexp", "-F --fixed-strings", "-G --basic-regexp", "-h --no-filename", "-H --with-filename", "-i --ignore-case", "-I",
			"-l --files-with-matches", "-L --files-without-match", "-n --line-number", "-o --only-matching", "-q --quiet --silent", "-r --recursive", "-R --dereference-recursive",
			"-s --no-messages", "-v --invert-match", "-w --word-regexp", "-x --line-regexp"),
		value(number, "-A --after-context", "-B --before-context", "-C --context", "-m --max-count"),
		many(value(anyText, "--include", "--exclude", "--exclude-dir")), optional(value("never|always|auto", "--color --colour"))))
	r.Forms = []Form{
		{Operands: []Operand{operands(1, 1, "a pattern"+notDash, anyText, ""), files(1)}},
		{Operands: []Operand{files(1)}, Options: many(pattern)},
	}
	r.Timeout = 300
	r.Denied = []Denied{denied("it reads patterns from another file", "-f --file"), denied("it can go on for ever; -E has most of it", "-P --perl-regexp"),
		denied("it opens devices", "-D --devices"), numbered}
	return r
}

// findRule has find's tests, and of its actions those that print.
func findRule() Rule {
	r := viewer("find", slices.Concat(
		flags("-H", "-L", "-P", "-a -and", "-o -or", "-not", "-true", "-false", "-depth", "-follow", "-xdev -mount", "-daystart", "-noleaf", "-warn", "-nowarn", "-ignore_readdir_race",
			"-empty", "-executable", "-readable", "-writable", "-nouser", "-nogroup", "-print", "-print0", "-ls", "-prune", "-quit"),
		many(value(anyText, "-name", "-iname", "-path -wholename", "-ipath -iwholename", "-regex", "-iregex", "-lname", "-ilname", "-printf")),
		value("emacs|posix-awk|posix-basic|posix-egrep|posix-extended|findutils-default", "-regextype"),
		value(number, "-maxdepth", "-mindepth"), many(value("[bcdpflsD](,[bcdpflsD])*", "-type", "-xtype")), many(value(`[+-]?[0-9]{1,9}[bcwkMG]?`, "-size")),
		many(value(`[+-]?[0-9]{1,9}(\.[0-9]{1,3})?`, "-mtime", "-mmin", "-atime", "-amin", "-ctime", "-cmin", "-used", "-links", "-inum", "-uid", "-gid")),
		many(value(`[/-]?([0-7]{1,4}|[ugoa]*[+=-][rwxXst]*(,[ugoa]*[+=-][rwxXst]*)*)`, "-perm")), many(value(name, "-user", "-group", "-fstype")),
		many(value(filePath, "-newer -mnewer", "-anewer", "-cnewer", "-samefile")), many(value(when, "-newermt", "-newerat", "-newerct"))),
		paths(1), operands(0, 64, "an operator: ! ( or )", `[!()]`, ""))
	r.Style, r.Timeout = Words, 300
	r.Denied = []Denied{
		denied("it runs other programs", "-exec -execdir -ok -okdir"), denied("it deletes files", "-delete"),
		denied("it writes a file", "-fprint -fprint0 -fprintf -fls"), denied("it reads names from another file", "-files0-from"),
	}
	return r
}
