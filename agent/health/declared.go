package health

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/nix-infra/nix-infra/protocol"
)

// File is where a system declares its health checks, below its store path. docs/health.md has the form.
const File = "etc/nix-infra/health.json"

const (
	maxFile = 256 << 10 // bytes
	maxText = 4 << 10   // bytes of one value
	maxArgs = 100
	maxName = 64 // bytes
)

// Declaration is a health check that a system declares.
type Declaration struct {
	Name     string
	Kind     string        // unit, tcp, http, command or file
	Interval time.Duration // from one try to the next
	Timeout  time.Duration // of a try
	Grace    time.Duration // from the activation's end: failures of tries that begin in it are forgiven

	probe probe
}

// probe is one try. Its error is why the check did not pass.
type probe func(ctx context.Context, unitState UnitState) error

// UnitState tells what systemd says of a unit: its ActiveState, such as active or failed, or not-found.
type UnitState func(ctx context.Context, unit string) (string, error)

// Declared are the health checks of a system, by its store path. A system without the file declares none. What is
// not understood is an error: a check that is not made must not pass for one that passed.
func Declared(system string) ([]Declaration, error) {
	f, err := os.Open(path.Join(system, File))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the system's health checks can't be read: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("the system's health checks can't be read: %w", err)
	}
	declared, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s of the system: %w; docs/health.md has the form", File, err)
	}
	return declared, nil
}

// Parse reads the document. Errors are one line and name the check and the field.
func Parse(data []byte) ([]Declaration, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("it has more than %d bytes", maxFile)
	}
	var document struct {
		Version int               `json:"v"`
		Checks  []json.RawMessage `json:"checks"`
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&document); err != nil {
		return nil, fmt.Errorf("it can't be decoded: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the document")
	}
	if document.Version != 1 {
		return nil, fmt.Errorf("field \"v\": %d; this agent knows version 1", document.Version)
	}
	if len(document.Checks) > protocol.MaxChecks {
		return nil, fmt.Errorf("field \"checks\": %d checks; %d are possible", len(document.Checks), protocol.MaxChecks)
	}
	var all []Declaration
	for i, raw := range document.Checks {
		c, err := parseCheck(raw)
		if err == nil && slices.ContainsFunc(all, func(other Declaration) bool { return other.Name == c.Name }) {
			err = errors.New("field \"name\": another check has it, too")
		}
		if err != nil {
			return nil, fmt.Errorf("check %s: %w", nameOf(i, c.Name), err)
		}
		all = append(all, c)
	}
	return all, nil
}

// nameOf names a check for people, by its place where it has no name that can be shown.
func nameOf(i int, name string) string {
	if checkName(name) != nil {
		return fmt.Sprintf("number %d", i+1)
	}
	return strconv.Quote(name)
}

// fields are a check's, as the document has them.
type fields struct {
	Name      string   `json:"name"`
	Kind      string   `json:"kind"`
	Interval  float64  `json:"interval"` // seconds, as are the next two
	Timeout   float64  `json:"timeout"`
	Grace     float64  `json:"grace"`
	Unit      string   `json:"unit"`
	Address   string   `json:"address"`
	URL       string   `json:"url"`
	Status    int      `json:"status"`
	Body      string   `json:"body"`
	BodyRegex string   `json:"body_regex"`
	Command   []string `json:"command"`
	Path      string   `json:"path"`
	Contains  string   `json:"contains"`

	said map[string]bool // which of them are there
}

var (
	common   = []string{"name", "kind", "interval", "timeout", "grace"}
	defaults = fields{Interval: 2, Timeout: 5, Grace: 30}
)

// kinds are the kinds of checks: the fields that each needs, those that it may have, and how it is tried.
var kinds = map[string]struct {
	needs, may []string
	make       func(fields) (probe, error)
}{
	"unit":    {needs: []string{"unit"}, make: unitProbe},
	"tcp":     {needs: []string{"address"}, make: tcpProbe},
	"http":    {needs: []string{"url"}, may: []string{"status", "body", "body_regex"}, make: httpProbe},
	"command": {needs: []string{"command"}, make: commandProbe},
	"file":    {needs: []string{"path"}, may: []string{"contains"}, make: fileProbe},
}

// parseCheck gives the check's name with an error, too, as far as it is known.
func parseCheck(raw json.RawMessage) (Declaration, error) {
	f := defaults
	var present map[string]json.RawMessage
	if err := json.Unmarshal(raw, &present); err != nil || present == nil {
		return Declaration{}, errors.New("it is no object")
	}
	_ = json.Unmarshal(present["name"], &f.Name) // for the errors before its turn comes
	d := Declaration{Name: f.Name}
	if err := json.Unmarshal(raw, &f); err != nil {
		var wrong *json.UnmarshalTypeError
		if errors.As(err, &wrong) {
			return d, fmt.Errorf("field %q: a %s is no value for it", wrong.Field, wrong.Value)
		}
		return d, err
	}
	f.said = map[string]bool{}
	for name, value := range present {
		f.said[name] = string(value) != "null"
	}
	if err := checkName(f.Name); err != nil {
		return d, fmt.Errorf("field \"name\": %w", err)
	}
	kind, ok := kinds[f.Kind]
	if !ok {
		return d, fmt.Errorf("field \"kind\": %.40q is none; there are %s", f.Kind, strings.Join(slices.Sorted(maps.Keys(kinds)), ", "))
	}
	known := slices.Concat(common, kind.needs, kind.may)
	for _, name := range slices.Sorted(maps.Keys(present)) {
		if !slices.Contains(known, name) {
			return d, fmt.Errorf("field %.40q is unknown; a check of kind %s has %s", name, f.Kind, strings.Join(known, ", "))
		}
	}
	for _, name := range kind.needs {
		if !f.said[name] {
			return d, fmt.Errorf("field %q is missing; a check of kind %s needs it", name, f.Kind)
		}
	}
	d.Kind = f.Kind
	var err error
	if d.Interval, err = duration("interval", f.Interval, 0.1, 3600); err != nil {
		return d, err
	}
	if d.Timeout, err = duration("timeout", f.Timeout, 0.1, 3600); err != nil {
		return d, err
	}
	if d.Grace, err = duration("grace", f.Grace, 0, 24*3600); err != nil {
		return d, err
	}
	d.probe, err = kind.make(f)
	return d, err
}

func checkName(name string) error {
	if name == "" || len(name) > maxName || strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Errorf("it has to be one line of 1 to %d bytes", maxName)
	}
	return nil
}

func duration(field string, seconds, least, most float64) (time.Duration, error) {
	if seconds < least || seconds > most {
		return 0, fmt.Errorf("field %q: %v s is out of range; %v to %v s are possible", field, seconds, least, most)
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

// text checks a value that is said: it says something, and is of a size that can be shown.
func text(field, value string) error {
	if value == "" || len(value) > maxText || strings.ContainsRune(value, 0) {
		return fmt.Errorf("field %q: it has %d bytes; 1 to %d are possible, without a zero byte", field, len(value), maxText)
	}
	return nil
}

// unitName has the characters that systemd allows, and a type.
var unitName = regexp.MustCompile(`^[A-Za-z0-9:_.\\@-]{1,250}\.[a-z]{3,9}$`)

func unitProbe(f fields) (probe, error) {
	if !unitName.MatchString(f.Unit) {
		return nil, fmt.Errorf("field \"unit\": %.80q is no unit's name, such as hello.service", f.Unit)
	}
	return func(ctx context.Context, state UnitState) error { return tryUnit(ctx, f.Unit, state) }, nil
}

func tcpProbe(f fields) (probe, error) {
	host, port, err := net.SplitHostPort(f.Address)
	n, err2 := strconv.ParseUint(port, 10, 16)
	if err != nil || err2 != nil || host == "" || n == 0 || len(host) > 253 {
		return nil, fmt.Errorf("field \"address\": %.80q is no host and port, such as 127.0.0.1:5432", f.Address)
	}
	return func(ctx context.Context, _ UnitState) error { return tryTCP(ctx, f.Address) }, nil
}

func httpProbe(f fields) (probe, error) {
	u, err := url.Parse(f.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || len(f.URL) > maxText {
		return nil, fmt.Errorf("field \"url\": %.80q is no URL of http or https", f.URL)
	}
	if u.User != nil {
		return nil, errors.New("field \"url\": a name and a password in it could be read by everybody, as all of the Nix store can")
	}
	w := wanted{status: f.Status, body: f.Body}
	if f.said["status"] && (f.Status < 100 || f.Status > 599) {
		return nil, fmt.Errorf("field \"status\": %d is no status of HTTP", f.Status)
	}
	if f.said["body"] {
		if err := text("body", f.Body); err != nil {
			return nil, err
		}
	}
	if f.said["body_regex"] {
		if err := text("body_regex", f.BodyRegex); err != nil {
			return nil, err
		}
		if w.regex, err = regexp.Compile(f.BodyRegex); err != nil {
			return nil, fmt.Errorf("field \"body_regex\": %w", err)
		}
	}
	return func(ctx context.Context, _ UnitState) error { return tryHTTP(ctx, u, w) }, nil
}

func commandProbe(f fields) (probe, error) {
	if len(f.Command) == 0 || len(f.Command) > maxArgs {
		return nil, fmt.Errorf("field \"command\": it has %d words; 1 to %d are possible", len(f.Command), maxArgs)
	}
	if !path.IsAbs(f.Command[0]) {
		return nil, fmt.Errorf("field \"command\": the program %.80q is no absolute path, and there is no shell that would look for it", f.Command[0])
	}
	for _, word := range f.Command {
		if len(word) > maxText || strings.ContainsRune(word, 0) {
			return nil, fmt.Errorf("field \"command\": a word of %d bytes; at most %d are possible, without a zero byte", len(word), maxText)
		}
	}
	return func(ctx context.Context, _ UnitState) error { return tryCommand(ctx, f.Command) }, nil
}

func fileProbe(f fields) (probe, error) {
	if err := text("path", f.Path); err != nil {
		return nil, err
	}
	if !path.IsAbs(f.Path) {
		return nil, fmt.Errorf("field \"path\": %.80q is no absolute path", f.Path)
	}
	if f.said["contains"] {
		if err := text("contains", f.Contains); err != nil {
			return nil, err
		}
	}
	return func(ctx context.Context, _ UnitState) error { return tryFile(ctx, f.Path, f.Contains) }, nil
}
