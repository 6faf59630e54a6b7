// Package policy is what a node's own configuration allows beyond what every node does: commands, shells, tunnels,
// uploads, what an action may take, and files to read.
package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"unicode"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/rule"
)

// File is where a system has its policy, below its store path. docs/policy.md has the form.
const File = "etc/nix-infra/policy.json"

const (
	maxFile  = 256 << 10 // bytes
	maxRoots = 32
	maxRules = 128
)

// Policy is a node's. The zero value allows nothing beyond the defaults.
type Policy struct {
	Files    Files
	Commands []rule.Rule // the node's own
	OnlyOwn  bool        // commands: without those that every node allows
	Shell    *Shell      // nil: none
	Tunnels  []Tunnel
	Uploads  []Root
	Actions  Actions
}

// Files says which files may be read.
type Files struct {
	Roots []string `json:"roots"` // folders, absolute: all files below them
}

// Shell says that admins may have texts run by a shell, as root.
type Shell struct {
	Timeout int `json:"timeout"` // seconds, for texts whose order has none, and at most
}

// Actions limits what an app module's action may take.
type Actions struct {
	Memory  int64 `json:"memory"`  // bytes
	Tasks   int   `json:"tasks"`   // processes and threads
	Timeout int   `json:"timeout"` // seconds, for orders that have none, and at most
}

// What an action may take, and how long a shell may, where the policy does not say.
const (
	defaultMemory  = 1 << 30 // bytes
	defaultTasks   = 1024
	defaultTimeout = 3600 // seconds

	leastMemory = 16 << 20 // bytes; less, and no shell starts
)

// Load reads the policy of a system, by its store path. A system without the file has the zero policy. What is not
// understood is an error: a policy that is half known is none.
func Load(system string) (Policy, error) {
	f, err := os.Open(path.Join(system, File))
	if errors.Is(err, fs.ErrNotExist) {
		return Policy{}, nil
	}
	if err != nil {
		return Policy{}, fmt.Errorf("the node's policy can't be read: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return Policy{}, fmt.Errorf("the node's policy can't be read: %w", err)
	}
	p, err := Parse(data)
	if err != nil {
		return Policy{}, fmt.Errorf("%s of the running system: %w; docs/policy.md has the form", File, err)
	}
	return p, nil
}

// Parse reads the document. Errors are one line and name the field.
func Parse(data []byte) (Policy, error) {
	if len(data) > maxFile {
		return Policy{}, fmt.Errorf("it has more than %d bytes", maxFile)
	}
	var document struct {
		Version         int             `json:"v"`
		Files           Files           `json:"files"`
		Commands        []rule.Rule     `json:"commands"`
		DefaultCommands *bool           `json:"defaultCommands"`
		AllowShell      json.RawMessage `json:"allowShell"`
		Tunnels         []Tunnel        `json:"tunnels"`
		Uploads         struct {
			Roots []Root `json:"roots"`
		} `json:"uploads"`
		Actions Actions `json:"actions"`
	}
	if err := decode(data, &document); err != nil {
		return Policy{}, err
	}
	if document.Version != 1 {
		return Policy{}, fmt.Errorf("field \"v\": %d; this agent knows version 1", document.Version)
	}
	p := Policy{
		Files:    document.Files,
		Commands: document.Commands,
		OnlyOwn:  document.DefaultCommands != nil && !*document.DefaultCommands,
		Tunnels:  document.Tunnels,
		Uploads:  document.Uploads.Roots,
		Actions:  document.Actions,
	}
	for _, check := range []func() error{p.checkFiles, p.checkCommands, p.checkTunnels, p.checkUploads, p.checkActions} {
		if err := check(); err != nil {
			return Policy{}, err
		}
	}
	var err error
	p.Shell, err = parseShell(document.AllowShell)
	return p, err
}

// Rules are those that a command is held against: the node's own come first, so that they may allow somebody what the
// defaults want a higher role for.
func (p Policy) Rules() []rule.Rule {
	if p.OnlyOwn {
		return p.Commands
	}
	return append(p.Commands[:len(p.Commands):len(p.Commands)], rule.Default()...)
}

// ActionLimits are those of the policy, and the defaults where it has none.
func (p Policy) ActionLimits() Actions {
	a := p.Actions
	if a.Memory == 0 {
		a.Memory = defaultMemory
	}
	if a.Tasks == 0 {
		a.Tasks = defaultTasks
	}
	if a.Timeout == 0 {
		a.Timeout = defaultTimeout
	}
	return a
}

func decode(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("it can't be decoded: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the document")
	}
	return nil
}

func (p Policy) checkFiles() error {
	if n := len(p.Files.Roots); n > maxRoots {
		return fmt.Errorf("field \"files.roots\": %d roots; %d are possible", n, maxRoots)
	}
	for _, r := range p.Files.Roots {
		if !isFolder(r) {
			return fmt.Errorf("field \"files.roots\": %.80q is no absolute path of a folder below / without . and .. in it", r)
		}
	}
	return nil
}

func (p Policy) checkCommands() error {
	if n := len(p.Commands); n > maxRules {
		return fmt.Errorf("field \"commands\": %d rules; %d are possible", n, maxRules)
	}
	for i := range p.Commands {
		r := &p.Commands[i]
		if r.Role == "" {
			r.Role = protocol.Operator
		}
		if err := r.Validate(); err != nil {
			return fmt.Errorf("field \"commands\": rule %d, %.80q: %w", i+1, r.Name, err)
		}
	}
	return nil
}

// parseShell reads true, false, or an object with a timeout.
func parseShell(text json.RawMessage) (*Shell, error) {
	var allowed bool
	if text == nil || json.Unmarshal(text, &allowed) == nil && !allowed {
		return nil, nil
	}
	s := Shell{Timeout: defaultTimeout}
	if !allowed {
		if err := decode(text, &s); err != nil {
			return nil, fmt.Errorf("field \"allowShell\": true, false, or an object with a timeout is expected: %w", err)
		}
	}
	if s.Timeout < 1 || s.Timeout > protocol.MaxRunTime {
		return nil, fmt.Errorf("field \"allowShell.timeout\": %d s; from 1 to %d are possible", s.Timeout, protocol.MaxRunTime)
	}
	return &s, nil
}

func (p Policy) checkActions() error {
	switch a := p.ActionLimits(); {
	case a.Memory < leastMemory:
		return fmt.Errorf("field \"actions.memory\": %d bytes; at least %d are needed", a.Memory, leastMemory)
	case a.Tasks < 1:
		return fmt.Errorf("field \"actions.tasks\": %d", a.Tasks)
	case a.Timeout < 1 || a.Timeout > protocol.MaxRunTime:
		return fmt.Errorf("field \"actions.timeout\": %d s; from 1 to %d are possible", a.Timeout, protocol.MaxRunTime)
	}
	return nil
}

// isFolder tells whether p is an absolute, clean path below /.
func isFolder(p string) bool {
	return p != "/" && path.IsAbs(p) && path.Clean(p) == p && len(p) <= 4096 && !strings.ContainsFunc(p, unicode.IsControl)
}
