package run

import (
	"os"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

const (
	unitPrefix   = "nix-infra-run-" // reconcile.OwnUnit knows it
	unitPattern  = unitPrefix + "*.service"
	startTimeout = 30 * time.Second // for systemd to make everything ready
	stopTimeout  = 5 * time.Second  // from SIGTERM to SIGKILL
)

func unitName(id string) string { return unitPrefix + id + ".service" }

// setting is a property of a unit, as StartTransientUnit has it.
type setting struct {
	Name  string
	Value dbus.Variant
}

func set(name string, value any) setting { return setting{name, dbus.MakeVariant(value)} }

// settings describe the unit. Everybody on the node can read them.
func (h *Systemd) settings(s Spec, p private, stdout, stderr *os.File) []setting {
	argv := s.Argv
	if s.Script != nil {
		argv = slices.Insert(slices.Clone(argv), 1, p.script())
	}
	type command struct {
		Path  string
		Argv  []string
		Flags []string
	}
	all := []setting{
		set("Description", "nix-infra: "+s.What),
		// The start is over when the program was executed, so that what can't be is known as such. The unit stays after
		// the end of its main process, with whatever others are left, until it is stopped: so the result can be read
		// without a reference, which the bus would lose with its connection.
		set("Type", "exec"),
		set("RemainAfterExit", true),
		// In arguments nothing is replaced: neither $ nor %.
		set("ExecStartEx", []command{{argv[0], argv, []string{"no-env-expand"}}}),
		// An exit status is the program's own affair and makes no unit fail, so that nobody's alarm goes off.
		set("SuccessExitStatus", ownStatuses()),
		set("WorkingDirectory", "-"+orRoot(s.Dir)),
		set("Environment", environ(s.Env)),
		set("StandardInput", "null"),
		set("StandardOutputFileDescriptor", dbus.UnixFD(stdout.Fd())),
		set("StandardErrorFileDescriptor", dbus.UnixFD(stderr.Fd())),
		set("UMask", uint32(0o077)),
		set("KillMode", "control-group"),
		set("SendSIGKILL", true),
		set("TimeoutStartUSec", micros(startTimeout)),
		set("TimeoutStopUSec", micros(stopTimeout)),
		set("RuntimeMaxUSec", micros(s.Timeout)),
		set("CPUAccounting", true),
		set("MemoryAccounting", true),
		set("MemoryMax", uint64(s.Memory)),
		set("MemorySwapMax", uint64(0)),
		set("OOMPolicy", "kill"),
		set("TasksMax", uint64(s.Tasks)),
		set("LimitCORE", uint64(0)), // a core has the environment in it
	}
	if !limitsMemory() {
		all = append(all, set("LimitDATA", uint64(s.Memory))) // of each process: better than none
	}
	if len(s.Private) > 0 {
		type file struct {
			Path     string
			Optional bool
		}
		all = append(all, set("EnvironmentFiles", []file{{p.environment(), false}}))
	}
	if len(s.Groups) > 0 {
		all = append(all, set("SupplementaryGroups", s.Groups))
	}
	switch s.User {
	case "root":
		return append(all, set("User", "root")) // so that HOME and the like are set
	case "":
		all = append(all, set("User", "nobody")) // the bus turns users of one run away that it can't look up, and systemctl needs it
	default:
		all = append(all, set("User", s.User))
	}
	return append(all, h.sandbox()...)
}

// ownStatuses are the exit statuses but for those with which systemd says that it could not get so far as to the program.
func ownStatuses() any {
	var own struct{ Codes, Signals []int32 }
	own.Signals = []int32{}
	for code := int32(1); code <= 255; code++ {
		if !systemdStatus(int(code)) {
			own.Codes = append(own.Codes, code)
		}
	}
	return own
}

func systemdStatus(code int) bool { return code >= 200 && code <= 245 }

// sandbox is what a command gets that need not be root: it sees most of the machine and can change nothing.
func (h *Systemd) sandbox() []setting {
	type list struct {
		Allow bool
		Names []string
	}
	var hidden []string
	for _, path := range append([]string{"/root", "/run/credentials", "/run/secrets", "/run/secrets.d", "/run/keys", h.Dir}, h.Hidden...) {
		hidden = append(hidden, "-"+path) // where it is there
	}
	return []setting{
		set("NoNewPrivileges", true),
		set("CapabilityBoundingSet", uint64(0)),
		set("ProtectSystem", "strict"),
		set("ProtectHome", "read-only"),
		set("PrivateTmp", true),
		set("PrivateDevices", true),
		set("ProtectKernelTunables", true),
		set("ProtectKernelModules", true),
		set("ProtectControlGroups", true),
		set("InaccessiblePaths", hidden),
		set("RestrictNamespaces", uint64(0)),
		set("RestrictRealtime", true),
		set("RestrictSUIDSGID", true),
		set("LockPersonality", true),
		set("SystemCallArchitectures", []string{"native"}),
		set("SystemCallFilter", list{true, []string{"@system-service"}}),
		set("SystemCallErrorNumber", int32(unix.EPERM)),
	}
}

// limitsMemory tells whether this machine's cgroups can.
func limitsMemory() bool {
	controllers, _ := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	return slices.Contains(strings.Fields(string(controllers)), "memory")
}

func orRoot(dir string) string {
	if dir == "" {
		return "/"
	}
	return dir
}

// micros is systemd's unit of time.
func micros(d time.Duration) uint64 { return uint64(d.Microseconds()) }
