package query

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// clock is a time that a test sets.
type clock struct{ at time.Time }

func (c *clock) now() time.Time { return c.at }

func newClock() *clock { return &clock{at: time.Unix(1_800_000_000, 0)} }

func openSeen(t *testing.T, path string, max int, c *clock) *Seen {
	t.Helper()
	s, err := OpenSeen(path, max, c.now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func add(t *testing.T, s *Seen, id string, until time.Time) bool {
	t.Helper()
	known, err := s.Add(id, until)
	if err != nil {
		t.Fatal(err)
	}
	return known
}

func TestSeenSurvivesRestart(t *testing.T) {
	path, c := filepath.Join(t.TempDir(), "seen.log"), newClock()
	s := openSeen(t, path, 0, c)
	if add(t, s, "a", c.at.Add(time.Minute)) || !add(t, s, "a", c.at.Add(time.Minute)) {
		t.Fatal("an id is known the second time, not the first")
	}
	odd := "b\n00 99999999999\n" // an id can't write lines of its own
	add(t, s, odd, c.at.Add(2*time.Minute))
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	s = openSeen(t, path, 0, c) // without Close: as after a crash
	if !add(t, s, "a", c.at.Add(time.Minute)) || !add(t, s, odd, c.at) {
		t.Fatal("forgotten by a restart")
	}
	c.at = c.at.Add(61 * time.Second)
	s = openSeen(t, path, 0, c)
	if add(t, s, "a", c.at.Add(time.Minute)) {
		t.Fatal("an expired id was kept")
	}
	if !add(t, s, odd, c.at) {
		t.Fatal("an id that had not expired was dropped")
	}
}

func TestSeenTornLastLine(t *testing.T) {
	path, c := filepath.Join(t.TempDir(), "seen.log"), newClock()
	s := openSeen(t, path, 0, c)
	for i := range 3 {
		add(t, s, fmt.Sprint(i), c.at.Add(time.Minute))
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for cut := len(data) - 1; cut > len(data)-40; cut-- {
		if err := os.WriteFile(path, data[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		s := openSeen(t, path, 0, c)
		if !add(t, s, "0", c.at) || !add(t, s, "1", c.at) {
			t.Fatalf("cut at %d: whole lines were forgotten", cut)
		}
		add(t, s, "new", c.at.Add(time.Minute))
		if s := openSeen(t, path, 0, c); !add(t, s, "new", c.at) {
			t.Fatalf("cut at %d: what was added after the torn line is lost", cut)
		}
	}
}

func TestSeenFullRefusesAndForgetsNothing(t *testing.T) {
	path, c := filepath.Join(t.TempDir(), "seen.log"), newClock()
	s := openSeen(t, path, 10, c)
	for i := range 10 {
		add(t, s, fmt.Sprint(i), c.at.Add(time.Minute))
	}
	if _, err := s.Add("one more", c.at.Add(time.Minute)); err == nil {
		t.Fatal("took more than it can hold")
	}
	for i := range 10 {
		if !add(t, s, fmt.Sprint(i), c.at) {
			t.Fatalf("%d was forgotten", i)
		}
	}
	c.at = c.at.Add(2 * time.Minute)
	if add(t, s, "one more", c.at.Add(time.Minute)) {
		t.Fatal("known, though it was refused")
	}
}

func TestSeenFileStaysSmall(t *testing.T) {
	path, c := filepath.Join(t.TempDir(), "seen.log"), newClock()
	s := openSeen(t, path, 0, c)
	for i := range 20_000 {
		if i%10 == 0 {
			c.at = c.at.Add(time.Second)
		}
		add(t, s, fmt.Sprint(i), c.at.Add(time.Minute))
	}
	info, err := os.Stat(path)
	if err != nil || info.Size() > 200<<10 {
		t.Fatalf("%v, %v", info.Size(), err)
	}
	if !add(t, s, "19999", c.at) {
		t.Fatal("forgotten by compaction")
	}
}

// TestSeenFullDisk: questions go on, orders don't, and nothing is forgotten meanwhile.
func TestSeenFullDisk(t *testing.T) {
	path, c := filepath.Join(t.TempDir(), "seen.log"), newClock()
	s := openSeen(t, path, 0, c)
	s.file.Close() // no write succeeds
	s.path = filepath.Join(path, "no folder")
	if add(t, s, "a", c.at.Add(time.Minute)) || !add(t, s, "a", c.at.Add(time.Minute)) {
		t.Fatal("memory does not work without the disk")
	}
	if err := s.Sync(); err == nil {
		t.Fatal("on disk, it says")
	}
	s.path = path
	if err := s.Sync(); err != nil {
		t.Fatalf("the disk is back: %v", err)
	}
	if s := openSeen(t, path, 0, c); !add(t, s, "a", c.at) {
		t.Fatal("lost for good")
	}
}
