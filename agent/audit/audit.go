// Package audit keeps a node's record of what it was told to do, by whom, and what came of it: a hash
// chain on disk, a line each in the node's own journal, and a copy in the controllers' audit stream.
//
// Start with Record. chain.go keeps the files, send.go carries what they hold to the stream, also what
// was recorded while no controller was reached.
package audit

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/nix-infra/nix-infra/protocol"
)

// Stream takes encoded records, in order, as one message (protocol.JoinRecords), and returns nil once it has them for good.
type Stream func(ctx context.Context, records [][]byte) error

// Journal takes one line with fields (upper-case names, as journald has them).
type Journal func(message string, fields map[string]string)

// Options say where records go.
type Options struct {
	Dir     string // of the chain's files; it must exist
	Node    string
	Log     *slog.Logger
	Stream  Stream
	Journal Journal       // nil: the log
	Delay   time.Duration // how long a viewer's records may wait for company on their way to the stream; 0: 2 s
	MaxFile int64         // bytes of one of the two files; 0: 1 MiB
}

// Log is the chain. It is safe for concurrent use.
type Log struct {
	o       Options
	retry   time.Duration // the first wait after the stream did not take something
	kick    chan struct{} // something urgent to send
	reached chan struct{} // a controller is there again

	mu    sync.Mutex
	chain *chain
	fault string // the last trouble with the files, so that it is said once
}

// Open continues the chain in o.Dir or begins one.
func Open(o Options) (*Log, error) {
	if o.Delay == 0 {
		o.Delay = 2 * time.Second
	}
	if o.MaxFile == 0 {
		o.MaxFile = 1 << 20
	}
	c, err := openChain(o.Dir, o.MaxFile)
	if err != nil {
		return nil, err
	}
	l := &Log{o: o, retry: retryFirst, kick: make(chan struct{}, 1), reached: make(chan struct{}, 1), chain: c}
	if c.repaired != "" {
		o.Log.Warn("the audit chain was repaired", "what", c.repaired)
	}
	return l, nil
}

// Record appends r to the chain; Version, Seq, Prev, At and, where it is zero, Time are filled in.
// Records of what does more than ask, by a proven sender, are on disk when it returns and on their way to the stream at once;
// the others are left to the page cache and to the next batch, so that questions stay cheap.
//
// An error means that the record is not kept. What it was about must then not be done, unless it is
// the node's own rescue.
func (l *Log) Record(r protocol.AuditRecord) error {
	important := r.User != "" && !protocol.OnlyAsks(r.Action)
	r.Version, r.At = protocol.Version, l.o.Node
	if r.Time.IsZero() {
		r.Time = time.Now().UTC()
	}
	l.mu.Lock()
	err := l.chain.append(&r, important)
	if err != nil && l.fault != err.Error() {
		l.fault = err.Error()
		l.o.Log.Error("an audit record could not be kept", "error", err)
	} else if err == nil {
		l.fault = ""
	}
	l.mu.Unlock()
	if important || r.Outcome != "" {
		l.journal(r)
	}
	if important {
		select {
		case l.kick <- struct{}{}:
		default:
		}
	}
	return err
}

// journal writes the record where `journalctl` on the node finds it. Of a question only its outcome.
func (l *Log) journal(r protocol.AuditRecord) {
	message := fmt.Sprintf("audit: %s by %s (%s): %s", orNone(string(r.Action)), orNone(r.User), orNone(string(r.Role)), orElse(r.Outcome, "begins"))
	if r.Detail != "" {
		message += ": " + r.Detail
	}
	if r.Reason != "" {
		message += ": " + r.Reason
	}
	message = oneLine(message)
	if l.o.Journal == nil {
		l.o.Log.Info(message, "seq", r.Seq, "request", r.Request, "target", r.Target)
		return
	}
	l.o.Journal(message, map[string]string{
		"NIX_INFRA_AUDIT":   strconv.FormatUint(r.Seq, 10),
		"NIX_INFRA_USER":    r.User,
		"NIX_INFRA_ROLE":    string(r.Role),
		"NIX_INFRA_ACTION":  string(r.Action),
		"NIX_INFRA_REQUEST": r.Request,
		"NIX_INFRA_TARGET":  r.Target,
		"NIX_INFRA_OUTCOME": r.Outcome,
		"NIX_INFRA_PREV":    r.Prev,
	})
}

// oneLine keeps what an unproven sender claims from looking like another record, or from painting on the
// terminal of whoever reads the journal.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
}

func orNone(s string) string { return orElse(s, "unknown") }

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// Close leaves the chain as the next Open wants it. Run must have ended.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.chain.close()
}
