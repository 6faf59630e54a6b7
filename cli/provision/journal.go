package provision

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// Journal is what is remembered of a machine that is being brought in, and can't be asked of the machine itself. It is
// gone when the machine is in.
type Journal struct {
	Version    int      `json:"v"`
	Phase      Phase    `json:"phase"`                // the one that was begun last
	Controller bool     `json:"controller,omitempty"` // it is to be the controller, too
	Error      string   `json:"error,omitempty"`      // why the last run ended in that phase
	Log        []string `json:"log,omitempty"`        // the last lines of the phase's log

	file string
}

// OpenJournal reads the journal of a machine below dir; one that does not exist is empty.
func OpenJournal(dir, name string) (*Journal, error) {
	j := &Journal{file: filepath.Join(dir, name+".json")}
	data, err := atomicfile.Read(j.file, 1<<20)
	if errors.Is(err, fs.ErrNotExist) {
		return j, nil
	} else if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, j); err != nil {
		return nil, fmt.Errorf("%s is damaged (%v); remove it: what is done is asked of the machine again", j.file, err)
	}
	if j.Version != protocol.Version {
		return nil, fmt.Errorf("%s is of version %d, this program knows version %d; upgrade the older one", j.file, j.Version, protocol.Version)
	}
	return j, nil
}

// Save writes it down.
func (j *Journal) Save() error {
	if err := os.MkdirAll(filepath.Dir(j.file), 0o755); err != nil {
		return err
	}
	j.Version = protocol.Version
	return atomicfile.Write(j.file, append(protocol.Encode(j), '\n'), 0o644)
}

// Remove forgets it: the machine is in. What a run that was killed left of a write goes, too.
func (j *Journal) Remove() error {
	dir, name := filepath.Split(j.file)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.Name() == name || strings.HasPrefix(e.Name(), "."+name+".tmp-") {
			if e := os.Remove(filepath.Join(dir, e.Name())); e != nil && !errors.Is(e, fs.ErrNotExist) {
				err = errors.Join(err, e)
			}
		}
	}
	return err
}
