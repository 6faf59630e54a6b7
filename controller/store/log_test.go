package store

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"go.uber.org/zap"
)

func TestBridge(t *testing.T) {
	var out bytes.Buffer
	log := zap.New(bridge{log: slog.New(slog.NewTextHandler(&out, nil))})
	for _, c := range []struct {
		message, err, level string
	}{
		{"failed to update storage version", "cannot detect storage schema version: missing term information", ""},
		{"failed to update storage version", "cannot detect storage schema version: damaged", "level=ERROR"},
		{"failed to publish", "no space left on device", "level=ERROR"},
	} {
		out.Reset()
		log.Error(c.message, zap.Error(errors.New(c.err)))
		if got := out.String(); (c.level == "") != (got == "") || !strings.Contains(got, c.level) {
			t.Errorf("%s: %s was logged as %q, want %q", c.message, c.err, got, c.level)
		}
	}
}

// A first start is nothing to be alarmed about.
func TestFirstStartLogsNoError(t *testing.T) {
	for range 2 {
		var out journal
		s, err := Open(context.Background(), Config{Dir: t.TempDir()}, slog.New(slog.NewTextHandler(&out, nil)))
		must(t, err)
		campaign(t, s, "ctl1")
		s.Close()
		if text := out.String(); strings.Contains(text, "level=ERROR") {
			t.Errorf("it logs\n%s", text)
		}
	}
}

// journal can be read while somebody writes: etcd has goroutines that outlive it for a moment.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}
