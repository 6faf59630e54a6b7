package reconcile

import (
	"fmt"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// How long the steps of Run's loop can take, with all that they try again. Each is bounded by itself; one
// that takes longer hangs, such as in a call to systemd that never returns.
const (
	slack       = 5 * time.Minute // for what has no bound of its own: disks, the observing, the evidence
	obtainTime  = manifestTries*(requestTimeout+10*time.Second) + slack
	resumeTime  = slack
	confirmTime = 2*time.Minute + bootTimeout + disarmTime + slack
	goBackTime  = revertTimeout + confirmTime + rebootTime
)

// pulse is the step that Run is at. The zero one rests.
type pulse struct {
	mu    sync.Mutex
	doing string
	until time.Time // zero: it waits, however long
}

// beat begins a step that ends, or that beats again, within a time.
func (p *pulse) beat(doing string, within time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.doing, p.until = doing, time.Now().Add(within)
}

func (p *pulse) rest() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.until = time.Time{}
}

func (p *pulse) check() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if late := time.Since(p.until); !p.until.IsZero() && late > 0 {
		return fmt.Errorf("%s should have ended %v ago", p.doing, late.Round(time.Second))
	}
	return nil
}

// stepTime is how long an attempt can be in its phase.
func (a *attempt) stepTime(m *protocol.Manifest) time.Duration {
	switch {
	case a.Phase == protocol.Accepted && m != nil:
		return fetchTimeout + buildLimit(m) + slack
	case a.Phase == protocol.Activating && a.Mode == protocol.Boot:
		return confirmTime
	case a.Phase == protocol.Rebooting:
		return rebootTime + slack
	case a.Phase == protocol.Confirming:
		return confirmTime
	case a.Phase == protocol.RollingBack:
		return goBackTime
	}
	return time.Duration(a.Timeout)*time.Second + slack
}
