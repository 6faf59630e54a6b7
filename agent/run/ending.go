package run

import (
	"fmt"
	"math"
	"strings"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

// service is what systemd knows of the unit's process: waitid's si_code and si_status, and what it took.
type service struct {
	result      string
	how, status int
	start, exit uint64 // microseconds of the monotonic clock
	cpu, memory uint64 // nanoseconds, bytes; unknown: not known
	everActive  bool
}

const unknown = math.MaxUint64 // systemd's word for it

func serviceOf(unit, all map[string]dbus.Variant) service {
	get := func(name string) any { return all[name].Value() }
	s := service{cpu: unknown, memory: unknown}
	s.result, _ = get("Result").(string)
	how, _ := get("ExecMainCode").(int32)
	status, _ := get("ExecMainStatus").(int32)
	s.how, s.status = int(how), int(status)
	s.start, _ = get("ExecMainStartTimestampMonotonic").(uint64)
	s.exit, _ = get("ExecMainExitTimestampMonotonic").(uint64)
	if cpu, ok := get("CPUUsageNSec").(uint64); ok {
		s.cpu = cpu
	}
	if memory, ok := get("MemoryPeak").(uint64); ok {
		s.memory = memory
	}
	active, _ := unit["ActiveEnterTimestampMonotonic"].Value().(uint64)
	s.everActive = active != 0
	return s
}

// ending puts into words how it ended. What never began is an error.
func (s service) ending(of Spec) (protocol.Ending, error) {
	if !s.everActive {
		return protocol.Ending{}, protocol.Refuse(protocol.Failed, "%.200s can't be started: %s", of.Argv[0], s.startFailure())
	}
	e := protocol.Ending{Exit: -1, Result: s.result}
	if s.exit > s.start {
		e.Millis = int64(s.exit-s.start) / 1000
	}
	if s.cpu != unknown {
		e.CPU = int64(s.cpu)
	}
	if s.memory != unknown {
		e.Memory = int64(s.memory)
	}
	killed := s.how == cldKilled || s.how == cldDumped
	switch {
	case s.result == protocol.ResultTimeout && e.Millis < of.Timeout.Milliseconds(): // of its stop
		e.Result, e.Reason = protocol.ResultSignal, "it was stopped on the node, and had to be killed"
	case s.result == protocol.ResultTimeout:
		e.Reason = fmt.Sprintf("it took longer than %v, and was ended", of.Timeout)
	case s.result == protocol.ResultMemory:
		e.Reason = fmt.Sprintf("it needed more memory than it may have (%d MiB) or than there is, and was ended", of.Memory>>20)
	case killed:
		e.Result = protocol.ResultSignal
		e.Reason = "killed by " + signalName(s.status)
	case s.how == cldExited && s.status == 0:
		e.Exit, e.Result = 0, protocol.ResultSuccess
	case s.how == cldExited:
		e.Exit, e.Result, e.Reason = s.status, protocol.ResultExit, fmt.Sprintf("exit status %d", s.status)
	default:
		e.Reason = "systemd calls it " + s.result
	}
	return e, nil
}

// How a process ended, of waitid(2).
const (
	cldExited = 1
	cldKilled = 2
	cldDumped = 3
)

func signalName(number int) string {
	if name := unix.SignalName(unix.Signal(number)); name != "" {
		return fmt.Sprintf("signal %d (%s)", number, name)
	}
	return fmt.Sprintf("signal %d", number)
}

// startFailure says why systemd did not get as far as to the program, by its exit statuses (systemd.exec(5)).
func (s service) startFailure() string {
	words := map[int]string{203: "it can't be executed", 216: "a group of its rule does not exist here", 217: "the user of its rule does not exist here",
		226: "its sandbox can't be made here", 228: "its sandbox can't be made here"}
	switch {
	case s.how == cldExited && systemdStatus(s.status):
		why := fmt.Sprintf("systemd ended with status %d", s.status)
		if w := words[s.status]; w != "" {
			why = w + " (" + why + ")"
		}
		return why + "; `journalctl -u '" + unitPrefix + "*'` on the node has more"
	case s.result != "" && s.result != protocol.ResultSuccess:
		return "systemd calls it " + strings.ReplaceAll(s.result, "-", " ")
	}
	return "systemd does not say why"
}
