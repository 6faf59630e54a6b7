package store

import (
	"context"
	"fmt"
	"log/slog"
	"strings"

	"go.uber.org/zap/zapcore"
)

// noTermYet ends the error of two lines that etcd logs when a new member looks for its storage's version
// before it has written anything. It looks again a moment later.
const noTermYet = "missing term information"

// bridge is a zap core that passes etcd's warnings and errors to slog.
type bridge struct {
	log    *slog.Logger
	fields []zapcore.Field
}

func (b bridge) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

func (b bridge) With(fields []zapcore.Field) zapcore.Core {
	return bridge{log: b.log, fields: append(b.fields[:len(b.fields):len(b.fields)], fields...)}
}

func (b bridge) Check(e zapcore.Entry, c *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if b.Enabled(e.Level) {
		return c.AddCore(e, b)
	}
	return c
}

func (b bridge) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range append(b.fields[:len(b.fields):len(b.fields)], fields...) {
		f.AddTo(enc)
	}
	level := slog.LevelWarn
	switch {
	case strings.HasSuffix(fmt.Sprint(enc.Fields["error"]), noTermYet):
		level = slog.LevelDebug
	case e.Level > zapcore.WarnLevel:
		level = slog.LevelError
	}
	b.log.Log(context.Background(), level, e.Message, "details", enc.Fields)
	return nil
}

func (b bridge) Sync() error { return nil }
