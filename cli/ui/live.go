package ui

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// Kind says how a line of progress is to be seen.
type Kind int

const (
	Active Kind = iota
	Waiting
	Good
	Bad
)

func (k Kind) colour() Colour {
	return [...]Colour{Active: Cyan, Waiting: Dim, Good: Green, Bad: Red}[k]
}

// rank orders lines by how much they deserve one of the few lines of a screen.
func (k Kind) rank() int { return [...]int{Active: 1, Waiting: 2, Good: 3, Bad: 0}[k] }

// redraw is the shortest time between two pictures.
const redraw = 100 * time.Millisecond

// Live shows how far many things are. On a terminal it is a block of lines that changes in place, never
// higher than the screen; elsewhere every change is a line "name: status".
type Live struct {
	t     *Terminal
	title string

	mu     sync.Mutex
	head   []string // below the title
	lines  map[string]*line
	order  []string
	height int // lines of the picture on the screen
	dirty  bool
	stop   chan struct{}
	done   chan struct{}
}

type line struct {
	name, status string
	kind         Kind
	changed      time.Time
}

// Live starts showing progress; Close ends it.
func (t *Terminal) Live(title string) *Live {
	l := &Live{t: t, title: Clean(title), lines: map[string]*line{}, stop: make(chan struct{}), done: make(chan struct{})}
	if !t.tty {
		close(l.done)
		return l
	}
	go l.run()
	return l
}

func (l *Live) run() {
	defer close(l.done)
	ticker := time.NewTicker(redraw)
	defer ticker.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-ticker.C:
			l.mu.Lock()
			if l.dirty {
				l.draw("")
			}
			l.mu.Unlock()
		}
	}
}

// Set says how far one thing is.
func (l *Live) Set(name, status string, kind Kind) {
	name, status = Clean(name), Clean(status)
	l.mu.Lock()
	defer l.mu.Unlock()
	at, said := l.lines[name], false
	if at == nil {
		at = &line{name: name}
		l.lines[name] = at
		l.order = append(l.order, name)
	} else if said = at.status == status; said && at.kind == kind {
		return
	}
	at.status, at.kind, at.changed, l.dirty = status, kind, time.Now(), true
	if !l.t.tty && !said { // in lines, a change of colour alone is none
		l.t.Printf("%s: %s\n", name, l.t.Paint(kind.colour(), status))
	}
}

// Head replaces the lines between the title and the things. It is only for a terminal: what they say moves all the time.
func (l *Live) Head(lines ...string) {
	head := make([]string, len(lines))
	for i := range lines {
		head[i] = Clean(lines[i])
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dirty = l.dirty || !slices.Equal(l.head, head)
	l.head = head
}

// Print writes a line that stays, above the block.
func (l *Live) Print(text string) {
	text = Clean(text) + "\n"
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.t.tty {
		l.t.Printf("%s", text)
		return
	}
	l.draw(text)
}

// Close draws the last picture and leaves it. It may be called twice.
func (l *Live) Close() {
	l.mu.Lock()
	select {
	case <-l.stop:
		l.mu.Unlock()
		return
	default:
	}
	close(l.stop)
	if l.t.tty {
		l.draw("")
		l.height = 0
	}
	l.mu.Unlock()
	<-l.done
}

// draw replaces the picture; above is written before it and scrolls away. The caller holds mu.
func (l *Live) draw(above string) {
	var b strings.Builder
	if l.height > 0 {
		fmt.Fprintf(&b, "\x1b[%dA\r\x1b[J", l.height)
	}
	b.WriteString(above)
	width, height := l.t.size()
	picture := l.picture(width, height-1)
	for _, p := range picture {
		b.WriteString(p)
		b.WriteByte('\n')
	}
	l.height, l.dirty = len(picture), false
	l.t.Printf("%s", b.String())
}

// picture is at most height lines of at most width characters: the title and the head, and every other line while they
// fit, else the counts and the lines that matter most.
func (l *Live) picture(width, height int) []string {
	title := l.title
	names := l.order
	head := l.head[:min(len(l.head), max(0, height-1))]
	room := max(0, height-1-len(head))
	if len(names) > room {
		counts := [4]int{}
		for _, at := range l.lines {
			counts[at.kind]++
		}
		title = fmt.Sprintf("%s: %d done, %d active, %d failed, %d waiting", l.title, counts[Good], counts[Active], counts[Bad], counts[Waiting])
		names = slices.Clone(names)
		slices.SortStableFunc(names, func(a, b string) int {
			x, y := l.lines[a], l.lines[b]
			if d := x.kind.rank() - y.kind.rank(); d != 0 {
				return d
			}
			return y.changed.Compare(x.changed)
		})
		names = names[:room]
	}
	widest := 0
	for _, n := range names {
		widest = max(widest, utf8.RuneCountInString(n))
	}
	widest = min(widest, width/2)
	picture := []string{l.t.Paint(Bold, Cut(title, width-1))}
	for _, h := range head {
		picture = append(picture, Cut(h, width-1))
	}
	for _, n := range names {
		at := l.lines[n]
		name := Cut(n, widest)
		pad := strings.Repeat(" ", widest-utf8.RuneCountInString(name)+2)
		picture = append(picture, name+pad+l.t.Paint(at.kind.colour(), Cut(at.status, width-widest-3)))
	}
	return picture
}
