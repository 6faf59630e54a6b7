// Package ui is how the command line looks: colours where they are wanted, tables, and progress that
// moves on a terminal and is plain lines everywhere else.
//
// Whatever came from a node goes through Clean before it is printed: a build log must not be able to
// move the cursor, change the title or hide text of the operator's terminal.
package ui

import (
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"
)

// Colour is a way to set text apart. Its zero value is plain text.
type Colour string

const (
	Plain  Colour = ""
	Bold   Colour = "1"
	Dim    Colour = "2"
	Red    Colour = "31"
	Green  Colour = "32"
	Yellow Colour = "33"
	Cyan   Colour = "36"
)

// Terminal is where output goes. It need not be a terminal.
type Terminal struct {
	out    io.Writer
	tty    bool
	colour bool
	size   func() (width, height int)
}

// New looks at where output goes. when is auto, always or never; auto is on for a terminal unless the
// environment says NO_COLOR (any value) or TERM=dumb.
func New(out io.Writer, when string, env func(string) string) (*Terminal, error) {
	t := &Terminal{out: out, size: func() (int, int) { return 80, 24 }}
	if f, ok := out.(*os.File); ok && term.IsTerminal(int(f.Fd())) && env("TERM") != "dumb" {
		t.tty = true
		t.size = func() (int, int) {
			w, h, err := term.GetSize(int(f.Fd()))
			if err != nil || w < 20 || h < 4 {
				return 80, 24
			}
			return w, h
		}
	}
	switch when {
	case "auto":
		t.colour = t.tty && env("NO_COLOR") == ""
	case "always":
		t.colour = true
	case "never":
	default:
		return nil, fmt.Errorf("--color %q: use auto, always or never", when)
	}
	return t, nil
}

// Interactive tells whether a person looks at a screen that can be redrawn.
func (t *Terminal) Interactive() bool { return t.tty }

// Paint colours text where colours are wanted. The text must be clean already.
func (t *Terminal) Paint(c Colour, text string) string {
	if !t.colour || c == Plain || text == "" {
		return text
	}
	return "\x1b[" + string(c) + "m" + text + "\x1b[0m"
}

// Printf prints; strings from elsewhere have to be cleaned by the caller.
func (t *Terminal) Printf(format string, args ...any) { fmt.Fprintf(t.out, format, args...) }

// Clear empties the screen, where there is one.
func (t *Terminal) Clear() {
	if t.tty {
		fmt.Fprint(t.out, "\x1b[H\x1b[2J")
	}
}

// Clean makes one line of harmless text out of anything: escape sequences go as a whole, line breaks
// and tabs become spaces, and control and text-direction characters disappear.
func Clean(s string) string {
	plain := strings.IndexFunc(s, func(r rune) bool { return r == utf8.RuneError || hidden(r) }) < 0
	if plain {
		return s
	}
	var b strings.Builder
	b.Grow(len(s))
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == '\x1b':
			n = escape(s[i:])
		case r == '\n' || r == '\t':
			b.WriteByte(' ')
		case hidden(r):
		default:
			b.WriteRune(r) // a broken byte becomes U+FFFD here
		}
		i += n
	}
	return strings.TrimRight(b.String(), " ")
}

// hidden tells whether a character could do more than be seen: control characters (C0, DEL, C1), the
// ones that format (text direction, zero width) and line separators.
func hidden(r rune) bool {
	if r < 0x7f { // most of what there is
		return r < 0x20
	}
	return unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == '\u2028' || r == '\u2029'
}

// escape is the length of the escape sequence that s starts with, as far as it is there.
func escape(s string) int {
	if len(s) < 2 {
		return len(s)
	}
	switch s[1] {
	case '[': // CSI: parameters, then one final byte
		for i := 2; i < len(s); i++ {
			if s[i] >= 0x40 && s[i] <= 0x7e {
				return i + 1
			}
			if s[i] < 0x20 || s[i] > 0x7e {
				return i
			}
		}
		return len(s)
	case ']', 'P', 'X', '^', '_': // OSC and friends: up to BEL or ESC \
		for i := 2; i < len(s); i++ {
			switch {
			case s[i] == '\a':
				return i + 1
			case s[i] == '\x1b' && i+1 < len(s) && s[i+1] == '\\':
				return i + 2
			case s[i] == '\n':
				return i
			}
		}
		return len(s)
	}
	if s[1] >= 0x20 && s[1] <= 0x7e {
		return 2
	}
	return 1
}

// Cut shortens clean text to a width in characters; what was cut is shown by an ellipsis.
func Cut(s string, width int) string {
	if utf8.RuneCountInString(s) <= width {
		return s
	}
	if width < 1 {
		return ""
	}
	return string([]rune(s)[:width-1]) + "…"
}
