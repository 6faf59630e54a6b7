package protocol

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
)

// What a viewer can ask a node: units, journal, statistics, files. Each answer fits into one message; what was left
// out of it is said by a Next that is not empty, which is what the next question's After (or Before) wants.

// MaxAnswer is about how many bytes of a list, a journal or a file one answer carries.
const MaxAnswer = 512 << 10

var (
	unitName    = regexp.MustCompile(`^[A-Za-z0-9:_.\\@-]{1,255}$`)
	unitPattern = regexp.MustCompile(`^[A-Za-z0-9:_.\\@*?\[\]!^-]{1,255}$`)
	unitState   = regexp.MustCompile(`^[a-z-]{1,32}$`)
	cursor      = regexp.MustCompile(`^[a-z]=[0-9a-f]{1,32}(;[a-z]=[0-9a-f]{1,32}){1,8}$`)
	bootID      = regexp.MustCompile(`^([0-9a-f]{32}|0|[+-]?[1-9][0-9]{0,3})$`)
)

// checkEach wants every string of a list to have a form.
func checkEach(what string, all []string, most int, form *regexp.Regexp) error {
	if len(all) > most {
		return fmt.Errorf("%d times %s; %d are possible", len(all), what, most)
	}
	for _, s := range all {
		if !form.MatchString(s) || strings.HasPrefix(s, "--") {
			return fmt.Errorf("%s %.80q is not valid", what, s)
		}
	}
	return nil
}

// UnitsQuery is ListUnits': the units that systemd has loaded and that have any of the states and match any of the
// patterns, in order of name.
type UnitsQuery struct {
	States   []string `json:"states,omitempty"`   // load, active or sub states; none: any
	Patterns []string `json:"patterns,omitempty"` // systemd's globs on names; none: any
	After    string   `json:"after,omitempty"`    // only names after this one
	Limit    int      `json:"limit,omitempty"`    // 0: as many as fit
}

// Validate checks the query's form.
func (q *UnitsQuery) Validate() error {
	if err := checkEach("state", q.States, 16, unitState); err != nil {
		return err
	}
	if err := checkEach("pattern", q.Patterns, 64, unitPattern); err != nil {
		return err
	}
	if q.Limit < 0 || q.After != "" && !unitName.MatchString(q.After) {
		return fmt.Errorf("the limit is negative, or after %.80q is no unit's name", q.After)
	}
	return nil
}

// UnitList answers ListUnits.
type UnitList struct {
	Units []Unit `json:"units"`
	Total int    `json:"total"` // of all that match, from After on
	Next  string `json:"next,omitempty"`
}

// Unit is a unit as lists have it; the states are systemd's words.
type Unit struct {
	Name        string `json:"name"`
	Description string `json:"description"`
	Load        string `json:"load"`   // loaded, not-found, masked, …
	Active      string `json:"active"` // active, inactive, failed, …
	Sub         string `json:"sub"`    // running, exited, dead, …
}

// UnitQuery is ShowUnit's.
type UnitQuery struct {
	Name  string `json:"name"`
	Lines int    `json:"lines"` // of its log, at most MaxUnitLog
}

// MaxUnitLog is how many entries of a unit's log ShowUnit gives at most.
const MaxUnitLog = 500

// Validate checks the query's form.
func (q *UnitQuery) Validate() error {
	if !unitName.MatchString(q.Name) || !strings.Contains(q.Name, ".") || strings.HasPrefix(q.Name, ".") {
		return fmt.Errorf("%.80q is no unit's name, such as nginx.service", q.Name)
	}
	if q.Lines < 0 || q.Lines > MaxUnitLog {
		return fmt.Errorf("%d lines; 0 to %d are possible", q.Lines, MaxUnitLog)
	}
	return nil
}

// UnitStatus answers ShowUnit. What does not go with the unit's type is left out.
type UnitStatus struct {
	Unit
	File     string     `json:"file,omitempty"`      // that it was loaded from
	State    string     `json:"state,omitempty"`     // of the file: enabled, linked, static, …
	Result   string     `json:"result,omitempty"`    // success, or why it failed, such as exit-code
	Since    *time.Time `json:"since,omitempty"`     // of its active state
	PID      int        `json:"pid,omitempty"`       // of its main process
	ExitCode int        `json:"exit_code,omitempty"` // of the main process, as the kernel told
	Restarts int        `json:"restarts,omitempty"`  // by itself, since it was last started by an order
	Memory   int64      `json:"memory,omitempty"`    // bytes
	CPU      int64      `json:"cpu,omitempty"`       // nanoseconds
	Tasks    int64      `json:"tasks,omitempty"`

	Dependencies map[string][]string `json:"dependencies,omitempty"` // names of units by systemd's word, such as Requires or WantedBy
	Timers       []Timer             `json:"timers,omitempty"`       // it itself, or those that trigger it
	Sockets      []Socket            `json:"sockets,omitempty"`      // it itself, or those that trigger it

	Log     []JournalEntry `json:"log,omitempty"`      // the newest, oldest first
	LogNext string         `json:"log_next,omitempty"` // the Before of what was before that
	LogNote string         `json:"log_note,omitempty"` // why there is no log, one line
}

// Timer is when a timer unit starts what.
type Timer struct {
	Name     string     `json:"name"`
	Triggers string     `json:"triggers"`
	Next     *time.Time `json:"next,omitempty"`
	Last     *time.Time `json:"last,omitempty"`
}

// Socket is where a socket unit listens.
type Socket struct {
	Name        string   `json:"name"`
	Listen      []string `json:"listen"` // systemd's words: Stream 0.0.0.0:22, …
	Connections int64    `json:"connections"`
	Accepted    int64    `json:"accepted"`
}

// JournalQuery is ReadJournal's and FollowJournal's. The newest entries that it is true of are given, and with
// FollowJournal those that come.
type JournalQuery struct {
	Units       []string `json:"units,omitempty"`       // names or globs; any of them
	Identifiers []string `json:"identifiers,omitempty"` // of syslog; any of them
	Since       int64    `json:"since,omitempty"`       // Unix microseconds, 0: from the beginning
	Until       int64    `json:"until,omitempty"`       // Unix microseconds, 0: to the end
	Priority    *int     `json:"priority,omitempty"`    // 0 (emerg) to 7 (debug): so important, or more; nil: any
	Grep        string   `json:"grep,omitempty"`        // PCRE2 that the message has to match
	Boot        string   `json:"boot,omitempty"`        // boot id, or how many boots ago (0, -1, …); "": any
	Lines       int      `json:"lines"`                 // entries, at most MaxLines
	Before      string   `json:"before,omitempty"`      // a cursor: only older ones
}

// MaxLines is how many entries of the journal one answer gives at most.
const MaxLines = 5000

// Validate checks that every field is what it is for: they become options of journalctl.
func (q *JournalQuery) Validate() error {
	if err := checkEach("unit", q.Units, 64, unitPattern); err != nil {
		return err
	}
	for _, s := range q.Identifiers {
		if s == "" || len(s) > 255 || strings.ContainsFunc(s, unicode.IsControl) {
			return fmt.Errorf("identifier %.80q is not a line of 1 to 255 bytes", s)
		}
	}
	const year9999 = 253402300799 * 1_000_000
	switch {
	case len(q.Identifiers) > 64:
		return fmt.Errorf("%d identifiers; 64 are possible", len(q.Identifiers))
	case q.Since < 0 || q.Until < 0 || q.Since > year9999 || q.Until > year9999:
		return fmt.Errorf("since and until must lie between the years 1970 and 9999")
	case q.Priority != nil && (*q.Priority < 0 || *q.Priority > 7):
		return fmt.Errorf("priority %d; 0 to 7 are possible", *q.Priority)
	case len(q.Grep) > 1000 || strings.ContainsFunc(q.Grep, unicode.IsControl):
		return fmt.Errorf("the pattern is not a line of at most 1000 bytes")
	case q.Boot != "" && !bootID.MatchString(q.Boot):
		return fmt.Errorf("boot %.80q is neither an id of 32 hexadecimal digits nor a number such as -1", q.Boot)
	case q.Lines < 0 || q.Lines > MaxLines:
		return fmt.Errorf("%d lines; 0 to %d are possible", q.Lines, MaxLines)
	case q.Before != "" && !cursor.MatchString(q.Before):
		return fmt.Errorf("%.80q is no cursor of a journal", q.Before)
	}
	return nil
}

// JournalPart answers ReadJournal, and is each part of FollowJournal's answer.
type JournalPart struct {
	Entries []JournalEntry `json:"entries"`           // in the order of the journal
	Next    string         `json:"next,omitempty"`    // ReadJournal: there are older ones, this is their Before
	Dropped int            `json:"dropped,omitempty"` // FollowJournal: entries that came faster than they could be sent
}

// JournalEntry is an entry of the journal.
type JournalEntry struct {
	Time       time.Time `json:"time"`
	Unit       string    `json:"unit,omitempty"`
	Identifier string    `json:"identifier,omitempty"`
	PID        int       `json:"pid,omitempty"`
	Priority   int       `json:"priority"` // 0 to 7; -1: none
	Message    string    `json:"message"`
	Cut        int       `json:"cut,omitempty"` // bytes of the message that were left out at its end
	Boot       string    `json:"boot,omitempty"`
	Cursor     string    `json:"cursor"`
}

// MaxEntry is how many bytes of a message an entry has.
const MaxEntry = 16 << 10

// The operations of ReadStats.
const (
	StatsHealth    = "health"
	StatsMemory    = "memory"
	StatsDiskIO    = "disk-io"
	StatsDiskUsage = "disk-usage"
	StatsNetwork   = "network"
	StatsProcesses = "processes"
	StatsSockets   = "sockets"
)

// StatsOperations are all operations, in the order in which they are shown.
var StatsOperations = []string{StatsHealth, StatsMemory, StatsDiskIO, StatsDiskUsage, StatsNetwork, StatsProcesses, StatsSockets}

// StatsQuery is ReadStats'.
type StatsQuery struct {
	Operations []string `json:"operations,omitempty"` // of StatsOperations; none: all
	Top        int      `json:"top,omitempty"`        // processes in each list; 0: 5
}

// Validate checks that the operations exist.
func (q *StatsQuery) Validate() error {
	for _, o := range q.Operations {
		if !slices.Contains(StatsOperations, o) {
			return fmt.Errorf("there is no operation %.80q; there are %s", o, strings.Join(StatsOperations, ", "))
		}
	}
	if len(q.Operations) > len(StatsOperations) || q.Top < 0 || q.Top > 100 {
		return fmt.Errorf("%d operations and the top %d; each once and 100 are possible", len(q.Operations), q.Top)
	}
	return nil
}

// FilesQuery is ReadFiles': the content of a file, or the names in a folder.
type FilesQuery struct {
	Path   string `json:"path"`             // absolute
	Offset int64  `json:"offset,omitempty"` // bytes, of a file
	Limit  int64  `json:"limit,omitempty"`  // bytes of a file; 0: as many as fit
	After  string `json:"after,omitempty"`  // of a folder: only names after this one
}

// Validate checks that the path is one that needs no interpretation.
func (q *FilesQuery) Validate() error {
	switch {
	case !path.IsAbs(q.Path) || path.Clean(q.Path) != q.Path || len(q.Path) > 4096 || strings.ContainsRune(q.Path, 0):
		return fmt.Errorf("%.80q is no absolute path without . and .. in it", q.Path)
	case q.Offset < 0 || q.Limit < 0:
		return fmt.Errorf("offset and limit can't be negative")
	case len(q.After) > 255 || strings.ContainsAny(q.After, "/\x00"):
		return fmt.Errorf("after %.80q is no file's name", q.After)
	}
	return nil
}

// FileAnswer answers ReadFiles. Of a folder it has Entries, of a file Data.
type FileAnswer struct {
	FileInfo
	Entries []FileInfo `json:"entries,omitempty"` // by name
	Next    string     `json:"next,omitempty"`    // of a folder that has more: the After of the rest
	Offset  int64      `json:"offset,omitempty"`  // of Data
	Data    []byte     `json:"data,omitempty"`    // the file goes on after it where Offset + its length is less than Size
}

// FileInfo is a file or folder.
type FileInfo struct {
	Name     string    `json:"name"`
	Kind     string    `json:"kind"` // file, folder, link or other
	Size     int64     `json:"size"` // bytes
	Mode     uint32    `json:"mode"` // the permission bits
	Modified time.Time `json:"modified"`
	Target   string    `json:"target,omitempty"` // of a link
}
