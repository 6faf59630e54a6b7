package reconcile

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/agent/credential"
	"github.com/nix-infra/nix-infra/agent/health"
	"github.com/nix-infra/nix-infra/nix"
)

// Host is what the engine does to the machine: a score of acts, so that all else can be tested without one.
// Each may be repeated after a crash; each ends with its context.
type Host interface {
	// Observe tells what runs and what would boot.
	Observe(ctx context.Context) (Observation, error)
	// Build makes the closure. The error's text is one line.
	Build(ctx context.Context, b Build) (closure string, err error)
	// Substitute brings a closure from binary caches; it builds nothing, and what none of the keys signed is
	// refused. The error's text is one line.
	Substitute(ctx context.Context, s Substitution) error
	// Generations are those of the system profile, the newest first.
	Generations(ctx context.Context) ([]nix.Generation, error)
	// DeleteGenerations takes generations of the system profile away, by their numbers; the current one is refused.
	DeleteGenerations(ctx context.Context, numbers []int) error
	// CollectGarbage deletes what nothing refers to any more and tells how many store paths and bytes that were.
	CollectGarbage(ctx context.Context) (paths int, freed int64, err error)
	// ClosureInfo lists what is in a closure.
	ClosureInfo(ctx context.Context, closure string) ([]nix.PathInfo, error)
	// Check tells whether a system is here and can be switched to.
	Check(closure string) error
	// Declared are the health checks that a system declares. What is not understood of them is an error.
	Declared(closure string) ([]health.Declaration, error)
	// UnitState is systemd's ActiveState of a unit, or not-found.
	UnitState(ctx context.Context, unit string) (string, error)
	// SetProfile makes closure the system profile's newest generation.
	SetProfile(ctx context.Context, closure string) error
	// Arm starts the timer that runs the revert service after r.Timeout, whatever becomes of the agent.
	// It fails where the timer exists already. Where the agent is a unit, the service starts that one last:
	// going back may have stopped it.
	Arm(ctx context.Context, r Revert) error
	// Disarm stops the timer and clears away the units of r's number. It tells whether the revert
	// service was started, by whomever; one that still runs is left alone.
	Disarm(ctx context.Context, r Revert) (started bool, err error)
	// Run runs a closure's switch-to-configuration in a unit of its own and waits for its end. A unit
	// that runs already is waited for, one that has succeeded is not run again.
	Run(ctx context.Context, j Job) (Outcome, error)
	// Journal gives the last lines of a unit's log, bounded.
	Journal(ctx context.Context, unit string, lines int) (string, error)
	// Renew has the agent's own unit restarted where that would now run another program than the agent is.
	// It tells whether it did: this process is about to be ended then, and another one goes on.
	Renew(ctx context.Context) (bool, error)
	// Reboot starts a clean reboot and returns.
	Reboot(ctx context.Context) error
	// System is for the secrets.
	credential.System
	// Loaders are the services that run, or have failed, and load one of these files as an encrypted credential.
	Loaders(ctx context.Context, files []string) ([]Loader, error)
	// Restart restarts units, or starts them, and waits until they are up. It says which ones are not.
	Restart(ctx context.Context, units []string) (failed []string, err error)
}

// Loader is a service that loads credentials.
type Loader struct {
	Unit  string
	Since time.Duration // of the monotonic clock, when it began to start
}

// Observation is what can be seen of the machine.
type Observation struct {
	Running    string // store path
	Booted     string // store path; "" where it is not known
	Profile    string // store path; "" where the profile was never set
	Generation int
	BootID     string
	Uptime     time.Duration // the monotonic clock, the one that timers go by
	Failed     []string      // units that are failed or wait for their automatic restart, without ours
}

// Build is what to build, and where to hold it against the garbage collector.
type Build struct {
	Dir, Attr, OutLink string
	Impure             bool
	Netrc              string // file by which Nix logs in to sources and caches; "": as it is configured
	Log                func(line string)
}

// Substitution is what to bring from where, and where to hold it against the garbage collector.
type Substitution struct {
	Path, OutLink string
	Caches, Keys  []string // as in protocol.Closure
	Netrc         string   // as in Build
	Log           func(line string)
}

// Revert is the way back from an attempt.
type Revert struct {
	Number  uint64        // names its units: the serial or, of an order of root's, the second in which it began
	Old     string        // store path to go back to
	Timeout time.Duration // after Arm
	Secrets string        // folder that new secrets are mounted over, which is where the old ones are; "": they stay
	Loaders []string      // units that load them, and are restarted when the old ones are back
}

// Timer is the name of the timer unit.
func (r Revert) Timer() string { return unitName("revert", r.Number, "timer") }

// Job is the one revert service, which the timer starts, too.
func (r Revert) Job() Job {
	return Job{Unit: unitName("revert", r.Number, "service"), Closure: r.Old, Action: "test", Timeout: revertTimeout, Revert: &r}
}

// Job is a run of a closure's switch-to-configuration.
type Job struct {
	Unit    string
	Closure string
	Action  string        // test, boot or dry-activate
	Timeout time.Duration // after which systemd ends it
	Revert  *Revert       // it is this one's service
	Attach  bool          // only look at, and wait for, a unit that was started before
	Again   bool          // run it again even where it had succeeded
	Forget  bool          // clear its unit away at its end: nobody asks for the result later
}

// Outcome is how a Job ended.
type Outcome struct {
	Found  bool   // false, with Attach: it was never started, or is gone
	Exit   int    // exit status; -1 where a signal or the timeout ended it
	Result string // systemd's word for it, such as success, exit-code, timeout, signal
}

func (o Outcome) String() string {
	if !o.Found {
		return "never started"
	}
	if o.Exit >= 0 {
		return fmt.Sprintf("exit status %d", o.Exit)
	}
	return o.Result
}

// Exit statuses of switch-to-configuration.
const (
	exitDone        = 0
	exitUnitsFailed = 4 // it switched, and some units failed
)

const (
	revertTimeout = 10 * time.Minute
	bootTimeout   = 10 * time.Minute
	dryTimeout    = 5 * time.Minute
)

const unitPrefix = "nix-infra-"

func unitName(what string, number uint64, kind string) string {
	return fmt.Sprintf("%s%s-%d.%s", unitPrefix, what, number, kind)
}

// OwnUnit tells whether a unit is one of the agent's transient ones, whose failure is no failure of
// the machine: one of the engine's, or one in which something is run for somebody (agent/run).
func OwnUnit(name string) bool {
	for _, what := range []string{"activate-", "revert-", "boot-", "restore-", "dry-", "run-"} {
		if strings.HasPrefix(name, unitPrefix+what) {
			return true
		}
	}
	return false
}
