package agent

import (
	"context"
	"fmt"
	"time"
)

// lookEvery is how often the service manager is told of what nothing announces, such as a lost
// connection.
const lookEvery = 10 * time.Second

// tellService tells the service manager that the agent is up, and from then on, for as long as it is
// true, that its parts are alive.
func (a *agent) tellService(ctx context.Context) error {
	a.o.Notify("READY=1")
	a.tellStatus()
	every := lookEvery
	if a.o.Watchdog > 0 {
		every = min(every, a.o.Watchdog/3)
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	busy, received := true, uint64(0) // starting was work, too
	for {
		// The engine's State waits for its lock: an engine that hangs keeps this loop from going on.
		a.tellStatus()
		if err := a.check(); err != nil {
			a.o.Log.Error("a part of the agent hangs", "error", err)
		} else if a.o.Watchdog > 0 {
			a.o.Notify("WATCHDOG=1")
		}
		select {
		case <-ctx.Done():
			a.o.Notify("STOPPING=1")
			return nil
		case <-tick.C:
		}
		now := a.server.Received()
		news := now != received || a.worked.Swap(false)
		if !news && busy && a.o.Settle != nil {
			a.o.Settle()
		}
		busy, received = news, now
	}
}

func (a *agent) check() error {
	if err := a.link.Check(); err != nil {
		return fmt.Errorf("link: %w", err)
	}
	if err := a.heart.Check(); err != nil {
		return fmt.Errorf("heartbeat: %w", err)
	}
	if err := a.engine.Check(); err != nil {
		return fmt.Errorf("deploy: %w", err)
	}
	return nil
}

// tellStatus gives `systemctl status` a line, where it is another one than before. No line is overtaken by an older one.
func (a *agent) tellStatus() {
	if a.o.Notify == nil {
		return
	}
	a.telling.Lock()
	defer a.telling.Unlock()
	if line := "STATUS=" + a.statusLine(); line != a.status {
		a.status = line
		a.o.Notify(line)
	}
}

func (a *agent) statusLine() string {
	line := "no controller reached"
	if url, _ := a.link.Status(); url != "" {
		line = "connected to " + url
	}
	if s := a.engine.State(); s.Phase != "" {
		line += fmt.Sprintf("; deployment %s: %s", s.Deployment, s.Phase)
	}
	return line
}
