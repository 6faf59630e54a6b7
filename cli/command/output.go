package command

import (
	"bytes"
	"io"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/nix-infra/nix-infra/cli/ui"
)

// outputDocument is output of a node's in --json: whole lines, as they came.
type outputDocument struct {
	Node   string  `json:"node"`
	Stream string  `json:"stream"` // stdout or stderr
	Text   *string `json:"text,omitempty"`
	Data   []byte  `json:"data,omitempty"` // in place of text that is not UTF-8
}

// maxLine is how much of a line is kept until its end comes, in bytes. What is longer is shown in pieces.
const maxLine = 64 << 10

// outlet is where the output of all nodes goes, lines of one at a time.
type outlet struct {
	mu     sync.Mutex
	q      *question
	stderr *ui.Terminal
}

func (q *question) outlet() (*outlet, error) {
	stderr, err := ui.New(q.Stderr, q.colour, q.Getenv)
	return &outlet{q: q, stderr: stderr}, err
}

// stream is one of a node's outputs.
type stream struct {
	outlet *outlet
	node   string
	name   string // in documents
	out    *ui.Terminal
	to     io.Writer
	held   []byte // of a line that has not ended
}

func (o *outlet) stdout(node string) *stream {
	return &stream{outlet: o, node: node, name: "stdout", out: o.q.out, to: o.q.Stdout}
}

func (o *outlet) stderrOf(node string, merged bool) *stream {
	s := &stream{outlet: o, node: node, name: "stderr", out: o.stderr, to: o.q.Stderr}
	if merged {
		s.out, s.to = o.q.out, o.q.Stdout
	}
	return s
}

// asIs tells whether nothing is done to the output, but to pass it on.
func (s *stream) asIs() bool { return !s.outlet.q.json && !s.outlet.q.named && !s.out.Interactive() }

// Write shows the lines that are whole now. It never fails: a stdout that is gone must not end what runs.
func (s *stream) Write(data []byte) (int, error) {
	s.outlet.mu.Lock()
	defer s.outlet.mu.Unlock()
	if s.asIs() && len(s.outlet.q.nodes) == 1 {
		s.to.Write(data)
		return len(data), nil
	}
	s.held = append(s.held, data...)
	whole := bytes.LastIndexByte(s.held, '\n') + 1
	if len(s.held)-whole > maxLine {
		whole = len(s.held)
	}
	s.show(s.held[:whole])
	s.held = append(s.held[:0], s.held[whole:]...)
	return len(data), nil
}

// end shows what is left of a line that did not end. Of several nodes it gets an end, so that the next one's begins on
// a line of its own.
func (s *stream) end() {
	s.outlet.mu.Lock()
	defer s.outlet.mu.Unlock()
	if len(s.held) > 0 && s.asIs() {
		s.held = append(s.held, '\n')
	}
	s.show(s.held)
	s.held = nil
}

func (s *stream) show(data []byte) {
	switch q := s.outlet.q; {
	case len(data) == 0:
	case q.json && utf8.Valid(data):
		text := string(data)
		q.document(outputDocument{Node: s.node, Stream: s.name, Text: &text})
	case q.json:
		q.document(outputDocument{Node: s.node, Stream: s.name, Data: data})
	case s.asIs():
		s.to.Write(data)
	default:
		var b strings.Builder
		for l := range bytes.Lines(data) {
			if q.named {
				b.WriteString(s.out.Paint(ui.Cyan, s.node+":") + " ")
			}
			b.WriteString(cleanLine(string(bytes.TrimSuffix(l, []byte("\n")))) + "\n")
		}
		io.WriteString(s.to, b.String())
	}
}

// cleanLine is ui.Clean for a line whose tabs stay: they may part columns.
func cleanLine(line string) string {
	fields := strings.Split(strings.TrimSuffix(line, "\r"), "\t")
	for i := range fields {
		fields[i] = ui.Clean(fields[i])
	}
	return strings.Join(fields, "\t")
}
