package run

import (
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// TestEnding: systemd has one word for what took too long to run and for what took too long to stop.
func TestEnding(t *testing.T) {
	of := Spec{Argv: []string{"/bin/x"}, Timeout: 10 * time.Second, Memory: 1 << 20}
	at := func(seconds uint64) uint64 { return 1 + seconds*1_000_000 }
	for name, c := range map[string]struct {
		s      service
		exit   int
		result string
	}{
		"too long":          {service{result: "timeout", how: cldKilled, status: 15, start: at(1), exit: at(11)}, -1, protocol.ResultTimeout},
		"stopped by others": {service{result: "timeout", how: cldKilled, status: 9, start: at(1), exit: at(7)}, -1, protocol.ResultSignal},
		"killed":            {service{result: "signal", how: cldKilled, status: 9, start: at(1), exit: at(2)}, -1, protocol.ResultSignal},
		"no memory":         {service{result: "oom-kill", how: cldKilled, status: 9, start: at(1), exit: at(2)}, -1, protocol.ResultMemory},
		"failed":            {service{result: "exit-code", how: cldExited, status: 3, start: at(1), exit: at(2)}, 3, protocol.ResultExit},
		"succeeded":         {service{result: "success", how: cldExited, start: at(1), exit: at(2)}, 0, protocol.ResultSuccess},
	} {
		c.s.everActive, c.s.cpu, c.s.memory = true, unknown, unknown
		e, err := c.s.ending(of)
		if err != nil || e.Exit != c.exit || e.Result != c.result || (e.Reason == "") != (c.result == protocol.ResultSuccess) {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
	}
	if _, err := (service{result: "exit-code", how: cldExited, status: 203}).ending(of); err == nil {
		t.Error("what never began ended")
	}
}
