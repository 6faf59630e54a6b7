package reconcile

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	evidenceUnits = 10 // newly failed units whose journals go into the report
	evidenceLines = 20
	activateLines = 100
	evidenceTime  = 10 * time.Second
)

// evidence collects the log of the activation and of the units that newly failed.
func (e *Engine) evidence(ctx context.Context, a *attempt, units []string) string {
	activated := !a.boots() && a.New != a.Old
	if !activated && len(units) == 0 {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, evidenceTime)
	defer cancel()
	var b strings.Builder
	add := func(unit string, lines int) {
		log, err := e.o.Host.Journal(ctx, unit, lines)
		if err != nil {
			log = fmt.Sprintf("(no log: %v)", err)
		}
		fmt.Fprintf(&b, "== %s\n%s\n", unit, strings.TrimSpace(log))
	}
	if activated {
		add(a.activation().Unit, activateLines)
	}
	for _, u := range units[:min(len(units), evidenceUnits)] {
		add(u, evidenceLines)
	}
	return clipTail(b.String(), protocol.MaxReportLog)
}
