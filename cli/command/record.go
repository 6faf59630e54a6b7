package command

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// readRecord reads one of the project's records, a JSON document below nix-infra/. One that is not there is as record
// is. Version is a field of record's.
func (a *app) readRecord(name string, record any, version *int) error {
	path := a.own(name)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if err := json.Unmarshal(data, record); err != nil {
		return fmt.Errorf("%s is damaged (%v); restore it, such as with git", path, err)
	}
	if *version != protocol.Version {
		return fmt.Errorf("%s is of version %d, this program knows version %d; upgrade the older one", path, *version, protocol.Version)
	}
	return nil
}

// alone does something with no other run of this program in between that does so, too: what is read from the project's
// records, changed and written must not undo what somebody else wrote meanwhile. It must not be called within itself.
func (a *app) alone(do func() error) error {
	dir, err := os.Open(a.dir) // not nix-infra/ in it: a project of the earlier tool has none
	if err != nil {
		return err
	}
	defer dir.Close() // and the lock with it
	for {
		if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err == nil {
			return do()
		} else if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("can't lock %s: %w", a.dir, err)
		}
	}
}

func (a *app) writeRecord(name string, record any) error {
	data, err := json.MarshalIndent(record, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(a.own(name), append(data, '\n'), 0o644)
}
