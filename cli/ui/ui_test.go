package ui

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestClean(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"plain text – ümlaut", "plain text – ümlaut"},
		{"\x1b[31mred\x1b[0m", "red"},
		{"a\x1b]0;title\x07b", "ab"},
		{"a\x1b]0;title\x1b\\b", "ab"},
		{"a\x1b[2Jb\rc", "abc"},
		{"two\nlines\there", "two lines here"},
		{"bell\x07 del\x7f c1\u009b31m", "bell del c131m"},
		{"abc\u202edcba", "abcdcba"},
		{"zero\u200bwidth", "zerowidth"},
		{"broken \xff byte", "broken \ufffd byte"},
		{"cut off \x1b[31", "cut off"},
		{"cut off \x1b", "cut off"},
		{"\x1b]never ends", ""},
		{"reset \x1bc!", "reset !"},
	} {
		if got := Clean(c.in); got != c.want {
			t.Errorf("Clean(%q) = %q, want %q", c.in, got, c.want)
		}
	}
}

func FuzzClean(f *testing.F) {
	f.Add("\x1b[31mred\x1b[0m")
	f.Add("\x1b]0;t\x07")
	f.Add("\u202e\x9b\xff")
	f.Fuzz(func(t *testing.T, s string) {
		got := Clean(s)
		if !utf8.ValidString(got) {
			t.Fatalf("Clean(%q) is not UTF-8", s)
		}
		for _, r := range got {
			if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) {
				t.Fatalf("Clean(%q) keeps %U", s, r)
			}
		}
		if again := Clean(got); again != got {
			t.Fatalf("Clean is not stable: %q, then %q", got, again)
		}
	})
}

func TestColour(t *testing.T) {
	env := func(string) string { return "" }
	for when, want := range map[string]string{"auto": "x", "never": "x", "always": "\x1b[31mx\x1b[0m"} {
		term, err := New(&bytes.Buffer{}, when, env)
		if err != nil {
			t.Fatal(err)
		}
		if got := term.Paint(Red, "x"); got != want {
			t.Errorf("--color %s: %q, want %q", when, got, want)
		}
	}
	if _, err := New(&bytes.Buffer{}, "sometimes", env); err == nil {
		t.Error("--color sometimes was accepted")
	}
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	term := &Terminal{out: &out}
	term.Table([]string{"NODE", "STATE", "REASON"}, [][]Cell{
		Text("web1", "confirmed", ""),
		Text("a-long-name", "lost", "off\x1b[2J\nnow"),
	})
	want := "NODE         STATE      REASON\nweb1         confirmed\na-long-name  lost       off now\n"
	if out.String() != want {
		t.Errorf("got:\n%s\nwant:\n%s", out.String(), want)
	}
}

func TestTableIsCutAtTheTerminal(t *testing.T) {
	var out bytes.Buffer
	term := &Terminal{out: &out, tty: true, size: func() (int, int) { return 20, 24 }}
	term.Table([]string{"NODE", "REASON"}, [][]Cell{Text("web1", strings.Repeat("x", 50))})
	for _, l := range strings.Split(out.String(), "\n") {
		if utf8.RuneCountInString(l) > 20 {
			t.Errorf("%q is wider than the terminal", l)
		}
	}
}

func TestLiveElsewhereIsPlainLines(t *testing.T) {
	var out bytes.Buffer
	l := (&Terminal{out: &out}).Live("deploying")
	l.Set("web1", "building", Active)
	l.Set("web1", "building", Active)
	l.Set("web1", "confirmed\x1b[2J", Good)
	l.Print("note\nwell")
	l.Close()
	l.Close()
	if want := "web1: building\nweb1: confirmed\nnote well\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

func TestLivePictureFitsTheScreen(t *testing.T) {
	term := &Terminal{out: &bytes.Buffer{}, size: func() (int, int) { return 60, 6 }}
	l := term.Live("deploying")
	for i := range 100 {
		l.Set(fmt.Sprintf("node%03d", i), "confirmed", Good)
	}
	l.Set("node050", "failed: "+strings.Repeat("long ", 20), Bad)
	l.Set("node051", "building", Active)
	picture := l.picture(60, 5)
	if len(picture) != 5 {
		t.Fatalf("%d lines on a screen for 5", len(picture))
	}
	for _, p := range picture {
		if utf8.RuneCountInString(p) > 60 {
			t.Errorf("%q is wider than the screen", p)
		}
	}
	if !strings.Contains(picture[0], "98 done, 1 active, 1 failed, 0 waiting") {
		t.Errorf("the title has no counts: %q", picture[0])
	}
	if !strings.HasPrefix(picture[1], "node050") || !strings.HasPrefix(picture[2], "node051") {
		t.Errorf("failures first, then what is active: %q", picture[1:3])
	}
}

func TestLiveHeadStaysOnTheScreen(t *testing.T) {
	l := (&Terminal{out: &bytes.Buffer{}, size: func() (int, int) { return 60, 6 }}).Live("deploying")
	for i := range 100 {
		l.Set(fmt.Sprintf("node%03d", i), "building", Active)
	}
	l.Head("3 of 100", "waits for "+strings.Repeat("long ", 20)+"\x1b[2J")
	picture := l.picture(60, 5)
	if len(picture) != 5 || picture[1] != "3 of 100" || !strings.HasPrefix(picture[2], "waits for long") || !strings.HasPrefix(picture[3], "node") {
		t.Errorf("title, head, things: %q", picture)
	}
	for _, p := range picture {
		if utf8.RuneCountInString(p) > 60 || strings.Contains(p, "\x1b[2J") {
			t.Errorf("%q is wider than the screen, or not clean", p)
		}
	}
	if picture := l.picture(60, 2); len(picture) != 2 {
		t.Errorf("%d lines on a screen for 2", len(picture))
	}
}

func TestLiveRedrawsInPlace(t *testing.T) {
	var out bytes.Buffer
	term := &Terminal{out: &out, tty: true, size: func() (int, int) { return 40, 10 }}
	l := term.Live("deploying")
	l.Set("web1", "building", Active)
	l.Print("a log line")
	l.Set("web1", "confirmed", Good)
	l.Close()
	got := out.String()
	if !strings.HasPrefix(got[strings.Index(got, "a log line"):], "a log line\ndeploying\n") {
		t.Errorf("the line that stays is not above the block: %q", got)
	}
	if !strings.HasSuffix(got, "\x1b[2A\r\x1b[Jdeploying\nweb1  confirmed\n") {
		t.Errorf("the block was not drawn over: %q", got)
	}
}
