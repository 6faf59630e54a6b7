package reconcile

import (
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	eventLines    = 64
	eventInterval = 200 * time.Millisecond
)

// buildLog hands lines on in batches.
type buildLog struct {
	lines chan string
	ended chan struct{}
	once  sync.Once
}

func (e *Engine) startLog(deployment string, phase protocol.Phase) *buildLog {
	l := &buildLog{lines: make(chan string, 4*eventLines), ended: make(chan struct{})}
	go func() {
		defer close(l.ended)
		tick := time.NewTicker(eventInterval)
		defer tick.Stop()
		var batch []string
		flush := func() {
			if len(batch) > 0 {
				e.event(deployment, protocol.Event{Version: protocol.Version, Time: e.now(), Phase: phase, Lines: batch})
				batch = nil
			}
		}
		for {
			select {
			case line, ok := <-l.lines:
				if !ok {
					flush()
					return
				}
				if batch = append(batch, line); len(batch) == eventLines {
					flush()
				}
			case <-tick.C:
				flush()
			}
		}
	}()
	return l
}

func (l *buildLog) add(line string) { l.lines <- line }

func (l *buildLog) stop() {
	l.once.Do(func() { close(l.lines) })
	<-l.ended
}
