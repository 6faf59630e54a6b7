package journal

import (
	"fmt"
	"strconv"

	"github.com/nix-infra/nix-infra/protocol"
)

// options are journalctl's for a query that was validated.
func options(q protocol.JournalQuery) []string {
	o := []string{"--no-pager", "--quiet", "--all", "--output=json",
		"--output-fields=MESSAGE,PRIORITY,SYSLOG_IDENTIFIER,_COMM,_PID,_SYSTEMD_UNIT,UNIT,_BOOT_ID"}
	for _, u := range q.Units {
		o = append(o, "--unit="+u)
	}
	for _, i := range q.Identifiers {
		o = append(o, "--identifier="+i)
	}
	if q.Since > 0 {
		o = append(o, "--since="+stamp(q.Since))
	}
	if q.Until > 0 {
		o = append(o, "--until="+stamp(q.Until))
	}
	if q.Priority != nil {
		o = append(o, "--priority="+strconv.Itoa(*q.Priority))
	}
	if q.Grep != "" {
		o = append(o, "--grep="+q.Grep)
	}
	if q.Boot != "" {
		o = append(o, "--boot="+q.Boot)
	}
	return o
}

// stamp is a time in systemd's way, of Unix microseconds.
func stamp(micros int64) string {
	return fmt.Sprintf("@%d.%06d", micros/1_000_000, micros%1_000_000)
}
