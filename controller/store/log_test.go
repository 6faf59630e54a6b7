package store

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
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
	var out bytes.Buffer
	ctx := context.Background()
	for range 2 {
		out.Reset()
		s, err := Open(ctx, Config{Dir: t.TempDir()}, slog.New(slog.NewTextHandler(&out, nil)))
		must(t, err)
		campaign(t, s, "ctl1")
		s.Close()
		if strings.Contains(out.String(), "level=ERROR") {
			t.Errorf("it logs\n%s", out.String())
		}
	}
}
