package journal

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nix-infra/nix-infra/protocol"
)

// maxLine bounds a line of journalctl's output: a message of MaxEntry bytes, of which each may be written as a number.
const maxLine = 256 << 10

// around is how many bytes at either end of a longer line are looked at.
const around = 4 << 10

// entries reads journalctl's JSON, an entry a line, until take says no, which is enough. A line that is longer than
// can be read is an entry that says so.
func entries(from io.Reader, take func(protocol.JournalEntry) bool) (enough bool, err error) {
	lines := bufio.NewReaderSize(from, 32<<10)
	var line, rest []byte
	for {
		skipped := 0
		line, rest = line[:0], rest[:0]
		for {
			piece, err := lines.ReadSlice('\n')
			room := min(len(piece), maxLine-len(line))
			line = append(line, piece[:room]...)
			if more := piece[room:]; len(more) > 0 {
				skipped += len(more)
				rest = append(rest, more...)
				rest = rest[max(0, len(rest)-around):]
			}
			if errors.Is(err, bufio.ErrBufferFull) {
				continue
			}
			if errors.Is(err, io.EOF) && len(line) == 0 {
				return false, nil
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return false, err
			}
			break
		}
		var e protocol.JournalEntry
		if skipped > 0 {
			e = tooLong(line, rest, skipped)
		} else if e, err = parse(line); err != nil {
			return false, err
		}
		if !take(e) {
			return true, nil
		}
	}
}

// parse reads an entry.
func parse(line []byte) (protocol.JournalEntry, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(line, &fields); err != nil {
		return protocol.JournalEntry{}, err
	}
	e := protocol.JournalEntry{Priority: -1, Boot: short(fields["_BOOT_ID"]), Cursor: short(fields["__CURSOR"])}
	e.Time = moment(short(fields["__REALTIME_TIMESTAMP"]))
	e.Unit = short(fields["_SYSTEMD_UNIT"])
	if unit := short(fields["UNIT"]); unit != "" {
		e.Unit = unit // systemd speaks of it
	}
	e.Identifier = first(short(fields["SYSLOG_IDENTIFIER"]), short(fields["_COMM"]))
	e.PID, _ = strconv.Atoi(short(fields["_PID"]))
	if p, err := strconv.Atoi(short(fields["PRIORITY"])); err == nil && p >= 0 && p <= 7 {
		e.Priority = p
	}
	e.Message, e.Cut = clip(text(fields["MESSAGE"]))
	return e, nil
}

// tooLong is an entry whose line could not be kept. The fields come in any order, and all but the message are small:
// the others stand around it, in the beginning of the line and in its rest.
func tooLong(line, rest []byte, skipped int) protocol.JournalEntry {
	known := string(line[:around]) + string(rest)
	e := protocol.JournalEntry{Priority: -1, Message: "(a message that is too long to be read)", Cut: len(line) + skipped}
	find := func(key string) string {
		_, after, _ := strings.Cut(known, `"`+key+`":"`)
		value, _, ok := strings.Cut(after, `"`)
		if !ok || !utf8.ValidString(value) {
			return ""
		}
		return value
	}
	e.Cursor = find("__CURSOR")
	e.Time = moment(find("__REALTIME_TIMESTAMP"))
	return e
}

// moment reads Unix microseconds. What lies beyond the year 9999 is none: an answer can't carry it.
func moment(micros string) (t time.Time) {
	const year10000 = 253402300800 * 1_000_000
	if n, err := strconv.ParseInt(micros, 10, 64); err == nil && n >= 0 && n < year10000 {
		t = time.UnixMicro(n).UTC()
	}
	return t
}

// short is a field that has a small value.
func short(raw json.RawMessage) string {
	s := text(raw)
	return strings.ToValidUTF8(s[:min(len(s), 512)], "")
}

// text is a field's value: a string, a list of bytes where it is none, or a list of these where there are several.
func text(raw json.RawMessage) string {
	var s string
	if json.Unmarshal(raw, &s) == nil {
		return s
	}
	var numbers []uint16
	if json.Unmarshal(raw, &numbers) == nil {
		bytes := make([]byte, len(numbers))
		for i, n := range numbers {
			bytes[i] = byte(n)
		}
		return strings.ToValidUTF8(string(bytes), "\uFFFD")
	}
	var several []json.RawMessage
	if json.Unmarshal(raw, &several) == nil && len(several) > 0 && len(several[0]) < len(raw) {
		return text(several[0])
	}
	return ""
}

// clip shortens a message to what an entry has of it, and tells how many bytes are left out.
func clip(s string) (string, int) {
	if len(s) <= protocol.MaxEntry {
		return s, 0
	}
	n := protocol.MaxEntry
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n], len(s) - n
}
