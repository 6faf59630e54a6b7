package fleet

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// journalRow is an entry of a node's journal, or a piece of what journalctl wrote there.
type journalRow struct {
	runRow
	Entry *protocol.JournalEntry `json:"entry,omitempty" jsonschema:"untrusted"`
}

// journalLines is how many entries are shown where nothing else is said.
const journalLines = 200

func (f *Fleet) addJournal(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "journalctl", Title: "Read journals", Toolset: setInspect, Role: protocol.Viewer, Timeout: maxRun,
		Description: fmt.Sprintf("Run journalctl on nodes. The newest %d entries are shown unless options say otherwise (-n, --since, --until). Narrow it by -u UNIT, -t IDENTIFIER, -p err, -g PATTERN, -b, -k. "+
			"With these (but -k), and times such as '1 hour ago' or '2026-01-31 15:04:05 UTC', entries come with fields.", journalLines) + noShell,
	}, func(ctx context.Context, c *mcp.Call, in struct {
		targetInput
		limitInput
		Options string `json:"options,omitempty" jsonschema:"such as -u nginx -p err --since '1 hour ago'"`
		Matches string `json:"matches,omitempty" jsonschema:"such as _PID=1 or SYSLOG_IDENTIFIER=sshd"`
	}) (*mcp.Answer[journalRow], error) {
		argv, err := journalctl(in.Options, in.Matches)
		if err != nil {
			return nil, err
		}
		if q := readJournalQuestion(argv[1:], time.Now()); q != nil {
			return f.askJournals(ctx, c, in.Target, q)
		}
		a, err := f.look(ctx, c, in.Target, in.limitInput, argv, nil)
		return widen(a, func(r runRow) journalRow { return journalRow{runRow: r} }), err
	})
}

var saysHowMany = regexp.MustCompile(`^(-[a-zA-Z]*n.*|--lines(=.*)?|-S.*|--since(=.*)?|-U.*|--until(=.*)?|--list-boots|--disk-usage|--header|-N|--fields|-F.*|--field(=.*)?)$`)

// journalctl makes the words of a command for journalctl.
func journalctl(options, matches string) (argv []string, err error) {
	argv = []string{"journalctl"}
	for _, input := range []struct{ name, text string }{{"options", options}, {"matches", matches}} {
		words, err := split(input.text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", input.name, err)
		}
		if i := slices.IndexFunc(words, func(w string) bool { return strings.HasPrefix(w, "-") }); input.name == "matches" && i >= 0 {
			return nil, fmt.Errorf("matches: %.80q is an option; it belongs into options", words[i])
		}
		argv = append(argv, words...)
	}
	if !slices.ContainsFunc(argv[1:], saysHowMany.MatchString) {
		argv = append(argv, fmt.Sprintf("--lines=%d", journalLines))
	}
	return argv, nil
}

// journalQuestion is a command for journalctl that the agents have a question of their own for.
type journalQuestion struct {
	protocol.JournalQuery
	newestFirst bool
}

var (
	aBoot         = regexp.MustCompile(`^([+-]?[0-9]{1,4}|[0-9a-f]{32})$`)
	journalOption = []known{
		{name: "no-pager"}, {name: "quiet", short: 'q'}, {name: "full", short: 'l'}, {name: "no-hostname"}, {name: "reverse", short: 'r'},
		{name: "unit", short: 'u', takes: aValue}, {name: "identifier", short: 't', takes: aValue}, {name: "priority", short: 'p', takes: aValue}, {name: "grep", short: 'g', takes: aValue},
		{name: "since", short: 'S', takes: aValue}, {name: "until", short: 'U', takes: aValue}, {name: "output", short: 'o', takes: aValue},
		{name: "boot", short: 'b', takes: perhaps, looks: aBoot}, {name: "lines", short: 'n', takes: perhaps, looks: aNumber},
	}
	priorities = []string{"emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"}
)

// readJournalQuestion finds out what words for journalctl ask; nil: something else.
func readJournalQuestion(words []string, now time.Time) *journalQuestion {
	options, operands, ok := readOptions(words, journalOption)
	if !ok || len(operands) > 0 {
		return nil
	}
	q := &journalQuestion{}
	q.Lines = protocol.MaxLines
	for _, o := range options {
		switch o.name {
		case "unit":
			if !strings.ContainsAny(o.value, ".*?[") {
				o.value += ".service"
			}
			q.Units = append(q.Units, o.value)
		case "identifier":
			q.Identifiers = append(q.Identifiers, o.value)
		case "priority":
			n := slices.Index(priorities, o.value)
			if n < 0 && len(o.value) == 1 && o.value[0] >= '0' && o.value[0] <= '7' {
				n = int(o.value[0] - '0')
			}
			if n < 0 {
				return nil // a range
			}
			q.Priority = &n
		case "grep":
			q.Grep = o.value
		case "since":
			if q.Since, ok = instant(o.value, now); !ok {
				return nil
			}
		case "until":
			if q.Until, ok = instant(o.value, now); !ok {
				return nil
			}
		case "output":
			if o.value != "short" {
				return nil
			}
		case "boot":
			if q.Boot = strings.TrimPrefix(o.value, "+"); o.value == "" {
				q.Boot = "0"
			}
		case "lines":
			if o.value != "" && !aNumber.MatchString(o.value) {
				return nil
			}
			if q.Lines = 10; o.value != "" {
				q.Lines, _ = strconv.Atoi(o.value)
			}
		case "reverse":
			q.newestFirst = true
		}
	}
	if q.Validate() != nil {
		return nil
	}
	return q
}

var (
	someTimeAgo = regexp.MustCompile(`^(-?)([0-9]{1,6}) ?(s|sec|seconds?|m|min|minutes?|h|hr|hours?|d|days?|w|weeks?)( ago)?$`)
	timeUnits   = map[byte]time.Duration{'s': time.Second, 'm': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour, 'w': 7 * 24 * time.Hour}
)

// instant reads a time of systemd's that means the same on every machine, in Unix microseconds: how long ago, or with its zone.
func instant(s string, now time.Time) (microseconds int64, ok bool) {
	if s == "now" {
		return now.UnixMicro(), true
	}
	if m := someTimeAgo.FindStringSubmatch(s); m != nil && (m[1] == "-") != (m[4] == " ago") {
		n, _ := strconv.Atoi(m[2])
		return now.Add(-time.Duration(n) * timeUnits[m[3][0]]).UnixMicro(), true
	}
	if seconds, ok := strings.CutPrefix(s, "@"); ok {
		n, err := strconv.ParseInt(seconds, 10, 40)
		return n * 1_000_000, err == nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02 15:04:05 UTC", "2006-01-02 15:04 UTC"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UnixMicro(), true
		}
	}
	return 0, false
}

func (f *Fleet) askJournals(ctx context.Context, c *mcp.Call, target string, q *journalQuestion) (*mcp.Answer[journalRow], error) {
	s, err := f.session(ctx, c)
	if err != nil {
		return nil, err
	}
	chosen, err := f.nodes(ctx, s, target, "")
	if err != nil {
		return nil, err
	}
	nodes := namesOf(chosen)
	most, dropped := fairShare(len(nodes)), map[*protocol.JournalPart]int{}
	parts, err := ask[protocol.JournalPart](ctx, s, nodes, protocol.ReadJournal, q.JournalQuery, func(p *protocol.JournalPart) {
		p.Entries, dropped[p] = newest(p.Entries, most)
	})
	if err != nil {
		return nil, err
	}
	a := &mcp.Answer[journalRow]{}
	var failed failures
	total := 0
	for i := range parts {
		r := &parts[i]
		if r.err != nil {
			failed.add(r.node, r.err)
			why := mcp.Clean(failure(r.err))
			a.Parts = append(a.Parts, mcp.Part[journalRow]{Head: r.node, Text: why, Row: &journalRow{runRow: runRow{Node: r.node, Error: why}}})
			continue
		}
		entries := r.said.Entries
		if q.newestFirst {
			slices.Reverse(entries)
		}
		for j := range entries {
			a.Parts = append(a.Parts, mcp.Part[journalRow]{Head: r.node, Text: entryText(&entries[j]), Untrusted: true, Row: &journalRow{runRow: runRow{Node: r.node}, Entry: &entries[j]}})
		}
		if total += len(entries); dropped[&r.said] > 0 || r.said.Next != "" && len(entries) < q.Lines {
			const note = "there are older entries, which did not fit: ask for less, or for --until an earlier time"
			a.Parts = append(a.Parts, mcp.Part[journalRow]{Head: r.node, Text: "[" + note + "]", Row: &journalRow{runRow: runRow{Node: r.node, Note: note}}})
		}
	}
	a.Summary = fmt.Sprintf("journalctl: %s %d entries.", failed.summary(len(nodes)), total)
	a.Failed = failed.count() == len(nodes)
	return a, nil
}

// newest are the newest entries that have no more than so many bytes together, and how many were left out.
func newest(entries []protocol.JournalEntry, most int) (kept []protocol.JournalEntry, dropped int) {
	const around = 200 // bytes of an entry beside its message
	at := len(entries)
	for size := 0; at > 0; at-- {
		if size += len(entries[at-1].Message) + around; size > most && at < len(entries) {
			break
		}
	}
	return slices.Clone(entries[at:]), at
}

// entryText is an entry as people read it.
func entryText(e *protocol.JournalEntry) string {
	text := fmt.Sprintf("%s %s[%d]: %s", e.Time.UTC().Format(time.RFC3339Nano), or(e.Identifier, e.Unit), e.PID, e.Message)
	if e.Cut > 0 {
		text += fmt.Sprintf(" … (%d bytes more)", e.Cut)
	}
	return text
}
