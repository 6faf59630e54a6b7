package run

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Files of a run, in a folder of its own below Systemd.Dir.
const (
	scriptFile  = "script"
	environFile = "environment"
)

// private is the folder of a run whose script or environment nobody else may read; the zero value is of one without.
type private struct{ dir string }

func (h *Systemd) newPrivate(s Spec) (p private, err error) {
	if s.Script == nil && len(s.Private) == 0 {
		return p, nil
	}
	dir := filepath.Join(h.Dir, s.ID)
	if err := errors.Join(os.MkdirAll(h.Dir, 0o700), os.Mkdir(dir, 0o700)); err != nil {
		return p, fmt.Errorf("can't make a private folder: %w", err)
	}
	p.dir = dir
	defer func() {
		if err != nil {
			p.remove()
		}
	}()
	if s.Script != nil {
		if err := os.WriteFile(p.script(), s.Script, 0o400); err != nil {
			return p, err
		}
	}
	if len(s.Private) > 0 {
		return p, os.WriteFile(p.environment(), environmentFile(s.Private), 0o600)
	}
	return p, nil
}

func (p private) script() string      { return filepath.Join(p.dir, scriptFile) }
func (p private) environment() string { return filepath.Join(p.dir, environFile) }

// started removes what is needed no longer once the program runs: systemd has read it.
func (p private) started() {
	if p.dir != "" {
		_ = os.Remove(p.environment()) // remove tries again
	}
}

func (p private) remove() {
	if p.dir != "" {
		_ = os.RemoveAll(p.dir) // a leftover is cleared when the agent starts
	}
}
