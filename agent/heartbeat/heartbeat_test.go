package heartbeat

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

type source struct{}

func (source) Facts(context.Context) protocol.Beat { return protocol.Beat{Kernel: "k"} }

// beating runs a heart inside a synctest bubble and gives the times of its beats since the start.
func beating(t *testing.T, interval time.Duration, err error) (h *Heart, beats *[]time.Duration) {
	t.Helper()
	begin := time.Now()
	beats = &[]time.Duration{}
	h = New(Options{Interval: interval, Source: source{}, Log: quiet(), Complete: func(b *protocol.Beat) { b.Serial = 7 },
		Send: func(b protocol.Beat) error {
			if b.Version != protocol.Version || b.Kernel != "k" || b.Serial != 7 || b.Interval != int(interval/time.Second) {
				t.Errorf("beat %+v", b)
			}
			*beats = append(*beats, time.Since(begin))
			return err
		}})
	go func() { _ = h.Run(t.Context()) }()
	return h, beats
}

func TestBeatsAtItsInterval(t *testing.T) {
	for _, err := range []error{nil, errors.New("not connected")} {
		synctest.Test(t, func(t *testing.T) {
			h, beats := beating(t, 10*time.Second, err)
			time.Sleep(1000 * time.Second)
			synctest.Wait()
			if n := len(*beats); n < 95 || n > 106 {
				t.Fatalf("%d beats in 1000 s", n)
			}
			if first := (*beats)[0]; first > 10*time.Second {
				t.Fatalf("the first one after %s", first)
			}
			for i, at := range (*beats)[1:] {
				if gap := at - (*beats)[i]; gap < 9*time.Second || gap > 11*time.Second {
					t.Fatalf("a gap of %s", gap)
				}
			}
			if err := h.Check(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestPhasesDiffer(t *testing.T) {
	seen := map[time.Duration]bool{}
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			_, beats := beating(t, 10*time.Second, nil)
			time.Sleep(11 * time.Second)
			synctest.Wait()
			seen[(*beats)[0].Truncate(time.Second)] = true
		})
	}
	if len(seen) < 4 {
		t.Fatalf("20 agents that start together begin in %d different seconds", len(seen))
	}
}

func TestChangesAreToldAtOnceAndGathered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, beats := beating(t, time.Hour, nil)
		h.Changed()
		synctest.Wait()
		if len(*beats) != 1 || (*beats)[0] != 0 {
			t.Fatalf("after a change: %v", *beats)
		}
		for range 1000 { // a second of changes
			h.Changed()
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if n := len(*beats); n < 5 || n > 7 {
			t.Fatalf("%d beats for 1001 changes in a second", n)
		}
		if last := (*beats)[len(*beats)-1]; last < 999*time.Millisecond {
			t.Fatalf("the last change was not told: %s", last)
		}
	})
}

func TestCheckFindsAHangingLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		h := New(Options{Interval: 10 * time.Second, Source: source{}, Log: quiet(), Complete: func(*protocol.Beat) {},
			Send: func(protocol.Beat) error { <-release; return nil }})
		go func() { _ = h.Run(t.Context()) }()
		time.Sleep(2 * time.Minute)
		if h.Check() == nil {
			t.Error("a heart that hangs is called alive")
		}
		close(release)
	})
}

func TestFactsOfAMachine(t *testing.T) {
	proc := t.TempDir()
	for name, content := range map[string]string{
		"sys/kernel/random/boot_id": "0d5c2c5e-5c0e-4c3c-9b0a-0a1b2c3d4e5f\n",
		"sys/kernel/osrelease":      "6.18.44\n",
		"uptime":                    "3601.52 7000.00\n",
		"loadavg":                   "0.50 1.25 2.00 1/234 5678\n",
		"meminfo":                   "MemTotal:        2048 kB\nMemFree:          100 kB\nMemAvailable:    1024 kB\nSwapTotal: 0 kB\n",
	} {
		path := filepath.Join(proc, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	h := &Host{Proc: proc, Store: proc}
	b := h.Facts(t.Context())
	v := b.Vitals
	if b.Kernel != "6.18.44" || b.BootID != "0d5c2c5e-5c0e-4c3c-9b0a-0a1b2c3d4e5f" || v.Uptime != 3601 ||
		v.Load != [3]float64{0.5, 1.25, 2} || v.MemTotal != 2<<20 || v.MemAvailable != 1<<20 || v.DiskTotal <= 0 || v.DiskFree <= 0 || v.DiskFree > v.DiskTotal {
		t.Fatalf("%+v", b)
	}
	// A machine of which nothing can be read still beats.
	b = (&Host{Proc: filepath.Join(proc, "none"), Store: filepath.Join(proc, "none")}).Facts(t.Context())
	if b.Vitals != (protocol.Vitals{}) || b.Kernel != "" {
		t.Fatalf("%+v", b)
	}
}

func TestOtherSystems(t *testing.T) {
	for _, c := range []struct{ running, closure, want string }{{"a", "a", ""}, {"a", "b", "b"}, {"a", "", ""}} {
		if got := otherThan(c.running, c.closure); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

// BenchmarkFacts is what a beat costs an idle node, apart from sending it.
func BenchmarkFacts(b *testing.B) {
	h := &Host{}
	for b.Loop() {
		h.Facts(b.Context())
	}
}
