package rollout

import (
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestSoak(t *testing.T) {
	soak := protocol.Strategy{Soak: 60}
	t.Run("between waves, not after the last", func(t *testing.T) {
		p := begin(t, soak, "1:held 2:held").next(running, "n1").asksAt(0)
		p.after(time.Minute).look("n1:ok").next(running, "").asksAt(time.Minute).reason("wave 1 is through and soaks")
		p.after(59*time.Second).next(running, "").asksAt(time.Second)
		p.after(time.Second).next(running, "n2").asksAt(0).reason("")
		p.look("n2:ok").next(done, "")
	})
	for look, words := range map[string]string{
		"degraded": "units failed since it was confirmed", "oklost": "lost since it was confirmed",
	} {
		t.Run("a confirmed node that is "+look+" counts", func(t *testing.T) {
			p := begin(t, soak, "1:held*2 2:held").next(running, "n1 n2")
			p.look("n1:ok n2:ok").next(running, "")
			p.after(30*time.Second).look("n2:"+look).next(stopped, "").reason("1 failed (n2), 0 may").asksAt(0)
			if p.last.Failing["n2"] != words {
				t.Errorf("explained with %q", p.last.Failing["n2"])
			}
		})
		t.Run("within the budget it goes on, and no longer counts when it is well", func(t *testing.T) {
			p := begin(t, protocol.Strategy{Soak: 60, MaxFailures: "1"}, "1:held 2:held").next(running, "n1")
			p.look("n1:ok").next(running, "").look("n1:"+look).next(running, "")
			p.look("n1:ok").next(running, "").counts(0, 1, 0)
		})
		t.Run("but not when all waves are through", func(t *testing.T) {
			p := begin(t, protocol.Strategy{MaxUnavailable: "1"}, "1:held*2 1:off").next(running, "n1").look("n1:ok")
			p.next(running, "n2").look("n2:ok").next(trailing, "")
			p.look("n1:"+look).next(trailing, "").counts(0, 0, 0).look("n3:held").next(trailing, "n3")
		})
	}
	t.Run("a node that comes back meanwhile goes at once, and does not make it longer", func(t *testing.T) {
		p := begin(t, soak, "1:held 1:off 2:held").next(running, "n1")
		p.look("n1:ok").next(running, "").after(50*time.Second).look("n2:held").next(running, "n2").asksAt(10 * time.Second)
		p.after(10*time.Second).next(running, "n3")
	})
	t.Run("a wave of which no node is left soaks for those that got it", func(t *testing.T) {
		p := begin(t, soak, "1:held 2:off 3:held").next(running, "n1")
		p.look("n1:taken").next(running, "").asksAt(time.Minute)
		p.after(time.Minute).next(running, "n3")
	})
	t.Run("what was confirmed counts until the last wave is through", func(t *testing.T) {
		p := begin(t, protocol.Strategy{MaxUnavailable: "2"}, "1:held 2:held*2").next(running, "n1").look("n1:ok")
		p.next(running, "n2 n3").look("n2:oklost").next(stopped, "")
	})
	t.Run("one that is lost takes up no room any more when all waves are through", func(t *testing.T) {
		// Only n2 kept n1, which came back in the last wave, from being released.
		p := begin(t, protocol.Strategy{MaxUnavailable: "1", MaxFailures: "1"}, "1:off 2:held").next(running, "n2")
		p.look("n1:held").next(running, "").look("n2:oklost").next(trailing, "n1").counts(0, 1, 0)
	})
	t.Run("a clock that is behind makes it longer", func(t *testing.T) {
		p := begin(t, soak, "1:held 2:held").next(running, "n1").look("n1:ok").next(running, "")
		p.after(-10*time.Second).next(running, "").asksAt(70 * time.Second) // a new leader's
	})
}

func TestAt(t *testing.T) {
	p := begin(t, protocol.Strategy{At: start.Add(time.Hour)}, "1:held 2:held")
	p.next(scheduled, "").asksAt(time.Hour).reason("waits for its time")
	p.after(30*time.Minute).next(scheduled, "").asksAt(30 * time.Minute)
	p.after(30*time.Minute).next(running, "n1").asksAt(0)
	p.after(-time.Minute).look("n1:ok").next(running, "").asksAt(time.Minute) // a new leader's clock is behind
	p.after(time.Minute).next(running, "n2")
	if !p.r.Since.Equal(start.Add(time.Hour)) {
		t.Errorf("since %s", p.r.Since)
	}

	begin(t, protocol.Strategy{At: start.Add(-time.Hour)}, "1:held").next(running, "n1")
	begin(t, protocol.Strategy{At: start.Add(time.Hour)}, "1:off").next(scheduled, "").after(time.Hour).next(trailing, "")
}

func TestWindows(t *testing.T) {
	night := []protocol.Window{{From: 22 * 60, To: 4 * 60}} // over midnight; it opens 10 h after the start
	late := []protocol.Window{{From: 13 * 60, To: 13*60 + 30}, {From: 18 * 60, To: 19 * 60}}
	t.Run("waits for it", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Windows: night}, "1:held").next(scheduled, "").asksAt(10 * time.Hour).reason("maintenance window")
		p.after(10*time.Hour).next(running, "n1").reason("")
	})
	t.Run("the one that opens first", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Windows: late}, "1:held").next(scheduled, "").asksAt(time.Hour)
		p.after(2*time.Hour).next(scheduled, "").asksAt(4 * time.Hour)
	})
	t.Run("another zone", func(t *testing.T) {
		stockholm := []protocol.Window{{Days: []time.Weekday{time.Tuesday}, From: 60, To: 120, Zone: "Europe/Stockholm"}}
		begin(t, protocol.Strategy{Windows: stockholm}, "1:held").next(scheduled, "").asksAt(11 * time.Hour)
	})
	t.Run("after its time", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Windows: late, At: start.Add(3 * time.Hour)}, "1:held")
		p.next(scheduled, "").asksAt(6 * time.Hour).reason("its time")
		p.after(4*time.Hour).next(scheduled, "").asksAt(2 * time.Hour).reason("maintenance window")
		p.after(2*time.Hour).next(running, "n1")
		open := begin(t, protocol.Strategy{Windows: late, At: start.Add(70 * time.Minute)}, "1:held")
		open.next(scheduled, "").asksAt(70 * time.Minute)
	})
	t.Run("closes in the middle of a wave", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Windows: late, MaxUnavailable: "1"}, "1:held*2 2:held").after(time.Hour).next(running, "n1")
		p.after(30*time.Minute).next(running, "").asksAt(4*time.Hour + 30*time.Minute).reason("maintenance window")
		p.look("n1:ok").next(running, "").asksAt(4*time.Hour + 30*time.Minute)
		p.after(4*time.Hour+30*time.Minute).next(running, "n2").reason("")
	})
	t.Run("closes before the next wave", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Windows: late}, "1:held 2:held").after(time.Hour).next(running, "n1")
		p.after(40*time.Minute).next(running, "").asksAt(0).look("n1:ok").next(running, "").asksAt(4*time.Hour + 20*time.Minute)
		p.after(4*time.Hour+20*time.Minute).next(running, "n2")
	})
	t.Run("a failure outside of it counts", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Windows: late}, "1:held 2:held").after(time.Hour).next(running, "n1")
		p.after(time.Hour).look("n1:failed").next(stopped, "")
	})
	t.Run("the soak goes on outside of it", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Windows: late, Soak: 3600}, "1:held 2:held").after(time.Hour).next(running, "n1")
		p.look("n1:ok").next(running, "").asksAt(time.Hour)
		p.after(time.Hour).next(running, "").asksAt(4 * time.Hour).reason("maintenance window")
		p.after(4*time.Hour).next(running, "n2")
	})
	t.Run("a node that comes back outside of it waits, and its wave with it where nobody got it", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Windows: late}, "1:held 2:off 3:held").after(time.Hour).next(running, "n1")
		p.after(30*time.Minute).look("n1:ok").next(running, "").asksAt(4*time.Hour + 30*time.Minute)
		p.look("n2:held").next(running, "").after(4*time.Hour+30*time.Minute).next(running, "n2")
		p.look("n2:ok").next(running, "n3")
	})
	t.Run("trailing", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Windows: late}, "1:held 1:off").after(time.Hour).next(running, "n1").look("n1:ok").next(trailing, "")
		p.after(time.Hour).next(trailing, "").asksAt(0)
		p.look("n2:held").next(trailing, "").asksAt(4 * time.Hour).reason("maintenance window")
		p.after(4*time.Hour).next(trailing, "n2").look("n2:ok").next(done, "")
	})
	t.Run("ends outside of it", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Windows: late}, "1:held").after(time.Hour).next(running, "n1")
		p.after(time.Hour).look("n1:ok").next(done, "")
	})
}
