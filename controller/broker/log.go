package broker

import (
	"fmt"
	"log/slog"
	"sync"
)

// logger passes the server's log to slog. Its notices are for its own operators (banners, ports,
// recovered streams), so that they become debug lines here.
type logger struct {
	log *slog.Logger

	mu     sync.Mutex
	fatals string
	recent string
}

func (l *logger) Noticef(format string, v ...any) { l.log.Debug(fmt.Sprintf(format, v...)) }
func (l *logger) Debugf(format string, v ...any)  {}
func (l *logger) Tracef(format string, v ...any)  {}

func (l *logger) Warnf(format string, v ...any) {
	l.log.Warn(l.keep(fmt.Sprintf(format, v...), false))
}

func (l *logger) Errorf(format string, v ...any) {
	l.log.Error(l.keep(fmt.Sprintf(format, v...), false))
}

func (l *logger) Fatalf(format string, v ...any) {
	l.log.Error(l.keep(fmt.Sprintf(format, v...), true))
}

func (l *logger) keep(line string, fatal bool) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recent = line
	if fatal {
		l.fatals = line
	}
	return line
}

func (l *logger) fatal() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fatals
}

func (l *logger) last() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.recent
}
