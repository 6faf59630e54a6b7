package journal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// fake is a journalctl that writes down its arguments, a line each, and then does what body says.
func fake(t *testing.T, body string) (r Reader, args func() []string) {
	t.Helper()
	dir := t.TempDir()
	program, said := filepath.Join(dir, "journalctl"), filepath.Join(dir, "args")
	script := "#!/bin/sh\nprintf '%s\\n' \"$@\" >" + said + "\ncd " + dir + "\n" + body + "\n"
	if err := os.WriteFile(program, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return Reader{Program: program}, func() []string {
		data, err := os.ReadFile(said)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
	}
}

// shown is an entry as journalctl shows it.
func shown(n int, message any) string {
	data, err := json.Marshal(map[string]any{"__CURSOR": fmt.Sprintf("s=1;i=%x", n), "__REALTIME_TIMESTAMP": fmt.Sprint(1_700_000_000_000_000 + n), "MESSAGE": message,
		"PRIORITY": "3", "SYSLOG_IDENTIFIER": "nginx", "_PID": "42", "_SYSTEMD_UNIT": "nginx.service", "_BOOT_ID": "b007"})
	if err != nil {
		panic(err)
	}
	return string(data)
}

// prints makes a body that prints these lines.
func prints(t *testing.T, r Reader, lines ...string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(filepath.Dir(r.Program), "out"), []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestReadNewestFirst(t *testing.T) {
	r, args := fake(t, "cat out")
	prints(t, r, shown(3, "three"), shown(2, "two"), shown(1, "one"))
	priority := 4
	part, err := r.Read(t.Context(), protocol.JournalQuery{Units: []string{"nginx.service", "a*"}, Identifiers: []string{"--x"}, Since: 1_500_000, Until: 1_800_000_000_000_000, Priority: &priority, Grep: "--vacuum-size=1", Boot: "-1", Lines: 2})
	if err != nil {
		t.Fatal(err)
	}
	want := protocol.JournalEntry{Time: time.UnixMicro(1_700_000_000_000_002).UTC(), Unit: "nginx.service", Identifier: "nginx", PID: 42, Priority: 3, Message: "two", Boot: "b007", Cursor: "s=1;i=2"}
	if len(part.Entries) != 2 || part.Entries[0] != want || part.Entries[1].Message != "three" || part.Next != "s=1;i=2" {
		t.Errorf("%+v", part)
	}
	got := args()
	for _, option := range []string{"--unit=nginx.service", "--unit=a*", "--identifier=--x", "--since=@1.500000", "--until=@1800000000.000000", "--priority=4", "--grep=--vacuum-size=1", "--boot=-1", "--reverse", "--output=json", "--no-pager"} {
		if !slices.Contains(got, option) {
			t.Errorf("no option %s in %q", option, got)
		}
	}
	for _, option := range got {
		if !strings.HasPrefix(option, "--") {
			t.Errorf("%q is no option", option)
		}
	}

	// The page before that: journalctl takes no beginning beside a cursor, so that it is kept here.
	prints(t, r, shown(2, "two"), shown(1, "one"))
	part, err = r.Read(t.Context(), protocol.JournalQuery{Lines: 5, Before: "s=1;i=3", Since: 1_700_000_000_000_002})
	if err != nil || len(part.Entries) != 1 || part.Entries[0].Message != "two" || part.Next != "" {
		t.Errorf("%+v, %v", part, err)
	}
	if got := args(); !slices.Contains(got, "--after-cursor=s=1;i=3") || slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, "--since") }) {
		t.Errorf("options %q", got)
	}
}

func TestReadBounds(t *testing.T) {
	r, _ := fake(t, "cat out")
	long := strings.Repeat("x", protocol.MaxEntry)
	var lines []string
	for n := range 100 {
		lines = append(lines, shown(1000-n, long))
	}
	prints(t, r, lines...)
	part, err := r.Read(t.Context(), protocol.JournalQuery{Lines: protocol.MaxLines})
	if err != nil || len(part.Entries) < 20 || part.Next != part.Entries[0].Cursor {
		t.Fatalf("%d entries, next %q, %v", len(part.Entries), part.Next, err)
	}
	if n := len(protocol.Encode(part)); n > protocol.MaxAnswer+protocol.MaxEntry {
		t.Errorf("an answer of %d bytes", n)
	}

	// One that goes on for ever is ended, and waited for.
	r, _ = fake(t, `while :; do echo '{"__CURSOR":"s=1;i=1","MESSAGE":"x"}'; done`)
	if part, err = r.Read(t.Context(), protocol.JournalQuery{Lines: 3}); err != nil || len(part.Entries) != 3 || part.Next == "" {
		t.Errorf("%+v, %v", part, err)
	}
	r, _ = fake(t, "exec sleep 1000")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := r.Read(ctx, protocol.JournalQuery{Lines: 3}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("in time: %v", err)
	}
}

func TestReadFailures(t *testing.T) {
	for _, c := range []struct{ body, says string }{
		{"echo 'No such boot ID in journal' >&2; echo more >&2; exit 1", "journalctl: No such boot ID in journal"},
		{"exit 3", "journalctl: exit status 3"},
		{"echo not json", "the output of journalctl"},
	} {
		r, _ := fake(t, c.body)
		if _, err := r.Read(t.Context(), protocol.JournalQuery{Lines: 1}); err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", c.body, err)
		}
	}
	r, _ := fake(t, "exit 1") // nothing matched
	if part, err := r.Read(t.Context(), protocol.JournalQuery{Lines: 1, Grep: "x"}); err != nil || len(part.Entries) != 0 || part.Entries == nil {
		t.Errorf("%+v, %v", part, err)
	}
}

func TestEntries(t *testing.T) {
	huge := strings.Repeat("y", 2*maxLine)
	for _, c := range []struct {
		name, line, message string
		cut                 int
	}{
		{"bytes", shown(1, []int{104, 105, 255}), "hi\uFFFD", 0},
		{"several", shown(1, []string{"first", "second"}), "first", 0},
		{"several, bytes", shown(1, []any{[]int{104, 105}, "x"}), "hi", 0},
		{"none", shown(1, nil), "", 0},
		{"control characters", shown(1, "a\x1b[31m\nb"), "a\x1b[31m\nb", 0},
		{"cut between characters", shown(1, strings.Repeat("x", protocol.MaxEntry-1)+"äö"), strings.Repeat("x", protocol.MaxEntry-1), 4},
		{"too long to be read", shown(1, huge), "(a message that is too long to be read)", len(shown(1, huge)) + 1},
	} {
		var all []protocol.JournalEntry
		enough, err := entries(strings.NewReader(c.line+"\n"+shown(2, "next")), func(e protocol.JournalEntry) bool { all = append(all, e); return true })
		if enough || err != nil || len(all) != 2 || all[0].Message != c.message || all[0].Cut != c.cut || all[0].Cursor != "s=1;i=1" || all[0].Time.IsZero() || all[1].Message != "next" {
			t.Errorf("%s: %v, %v, %d entries: %.300v", c.name, enough, err, len(all), all)
		}
	}
}

func TestFollow(t *testing.T) {
	// The first call reads what is there, the second follows from there on.
	r, args := fake(t, `case "$*" in
*--follow*) cat out; exec sleep 1000 ;;
*) echo '`+shown(1, "old")+`' ;;
esac`)
	prints(t, r, shown(2, "two"), shown(3, "three"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []string
	parts := 0
	err := r.Follow(ctx, protocol.JournalQuery{Lines: 1, Since: 1}, func(p protocol.JournalPart) error {
		if parts++; parts == 1 && len(p.Entries) != 0 {
			t.Errorf("the first part %+v", p)
		}
		for _, e := range p.Entries {
			got = append(got, e.Message)
		}
		if len(got) == 3 {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || fmt.Sprint(got) != "[old two three]" {
		t.Errorf("%v, %v", got, err)
	}
	if a := args(); !slices.Contains(a, "--after-cursor=s=1;i=1") || !slices.Contains(a, "--follow") || slices.ContainsFunc(a, func(s string) bool { return strings.HasPrefix(s, "--since") }) {
		t.Errorf("options %q", a)
	}
	for _, q := range []protocol.JournalQuery{{Until: 1}, {Before: "s=1;i=1"}} {
		if err := r.Follow(t.Context(), q, nil); !errors.Is(err, &protocol.Refusal{Code: protocol.Invalid}) {
			t.Errorf("%+v: %v", q, err)
		}
	}
	// Where nothing is there, from now on; and a journalctl that ends is a failure.
	r, args = fake(t, `case "$*" in *--follow*) cat out ;; esac`)
	prints(t, r, shown(2, "two"))
	got = nil
	err = r.Follow(t.Context(), protocol.JournalQuery{Lines: 1}, func(p protocol.JournalPart) error {
		for _, e := range p.Entries {
			got = append(got, e.Message)
		}
		return nil
	})
	if err == nil || fmt.Sprint(got) != "[two]" || !slices.ContainsFunc(args(), func(s string) bool { return strings.HasPrefix(s, "--since=@") }) {
		t.Errorf("%v, %v, %q", got, err, args())
	}
}

// TestFollowSlowReceiver: who takes parts slowly misses entries and is told how many; none waits in memory beyond the bound.
func TestFollowSlowReceiver(t *testing.T) {
	const total = 400
	r, _ := fake(t, `case "$*" in *--follow*) cat out; exec touch printed ;; esac`)
	var lines []string
	for n := range total {
		lines = append(lines, shown(n, strings.Repeat("x", 4000)))
	}
	prints(t, r, lines...)
	printed := filepath.Join(filepath.Dir(r.Program), "printed")
	got, dropped, largest := 0, 0, 0
	err := r.Follow(t.Context(), protocol.JournalQuery{}, func(p protocol.JournalPart) error {
		if got > 0 || len(p.Entries) > 0 { // it takes no part before everything has come
			for {
				if _, err := os.Stat(printed); err == nil {
					break
				}
				time.Sleep(time.Millisecond)
			}
		}
		got, dropped = got+len(p.Entries), dropped+p.Dropped
		largest = max(largest, len(protocol.Encode(p)))
		return nil
	})
	if err == nil || got+dropped != total || dropped == 0 || largest > 2*maxWaiting {
		t.Errorf("%d entries, %d dropped, the largest part has %d bytes: %v", got, dropped, largest, err)
	}
}

func FuzzEntries(f *testing.F) {
	f.Add([]byte(shown(1, "x") + "\n" + shown(2, []int{1, 2})))
	f.Add([]byte(`{"MESSAGE":[["a"]]}`))
	f.Add([]byte(`{"__REALTIME_TIMESTAMP":"700000000000000000"}`))
	f.Add([]byte(`{"__CURSOR":"` + strings.Repeat("a", maxLine) + `"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		n := 0
		_, _ = entries(strings.NewReader(string(data)), func(e protocol.JournalEntry) bool {
			if len(e.Message) > protocol.MaxEntry || len(e.Unit) > 512*3 || e.Priority < -1 || e.Priority > 7 {
				t.Fatalf("%+v", e)
			}
			protocol.Encode(e)
			n++
			return n < 100
		})
	})
}
