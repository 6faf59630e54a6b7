package reconcile

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	sdunit "github.com/coreos/go-systemd/v22/unit"

	"github.com/nix-infra/nix-infra/agent/credential"
)

const (
	mountTime   = 20 * time.Second
	loadersTime = 20 * time.Second
)

// Encrypt implements credential.System.
func (h *SystemdHost) Encrypt(ctx context.Context, name string, value []byte) ([]byte, error) {
	return credential.Encrypt(ctx, name, value)
}

// mountUnit is how systemd calls the mount of a place.
func mountUnit(where string) string { return sdunit.UnitNamePathEscape(where) + ".mount" }

// Mount implements credential.System. It is a unit of systemd's, which mounts where all processes see it, whatever the
// agent's own unit is kept from, and which a revert takes away.
func (h *SystemdHost) Mount(ctx context.Context, what, where string) error {
	ctx, cancel := context.WithTimeout(ctx, mountTime)
	defer cancel()
	c, err := connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	name := mountUnit(where)
	done := make(chan string, 1)
	var started bool
	var refused error
	for {
		s, err := statusOf(ctx, c, name)
		switch {
		case err != nil:
			return err
		case s.succeeded():
			return nil
		case s.failed():
			_ = c.ResetFailedUnitContext(ctx, name) // a mount that failed is no unit that failed
			if started {
				return fmt.Errorf("systemd can't mount %s at %s: %s", what, where, s.result)
			}
		}
		if !started && !s.running() {
			// It may be refused while systemd still has a unit of that name from before; then it is asked again.
			_, refused = c.StartTransientUnitContext(ctx, name, "replace", []dbus.Property{
				dbus.PropDescription("nix-infra: secrets until the next boot"),
				property("What", what), property("Type", "none"), property("Options", "bind"), property("LazyUnmount", true)}, done)
			started = refused == nil
		}
		awaitJob(ctx, done)
		if ctx.Err() != nil {
			return fmt.Errorf("systemd did not mount %s at %s: %w", what, where, errors.Join(refused, ctx.Err()))
		}
	}
}

// Unmount implements credential.System.
func (h *SystemdHost) Unmount(ctx context.Context, where string) error {
	ctx, cancel := context.WithTimeout(ctx, mountTime)
	defer cancel()
	c, err := connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	return clearUnit(ctx, c, mountUnit(where))
}

// Loaders implements Host.
func (h *SystemdHost) Loaders(ctx context.Context, files []string) ([]Loader, error) {
	if len(files) == 0 {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, loadersTime)
	defer cancel()
	c, err := connect(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	services, err := c.ListUnitsByPatternsContext(ctx, []string{"active", "reloading", "activating", "failed"}, []string{"*.service"})
	if err != nil {
		return nil, fmt.Errorf("systemd can't list its services: %w", err)
	}
	var all []Loader
	for _, s := range services {
		if OwnUnit(s.Name) {
			continue
		}
		p, err := c.GetUnitTypePropertyContext(ctx, s.Name, "Service", "LoadCredentialEncrypted")
		if err != nil {
			continue // gone meanwhile, or a systemd that has no credentials
		}
		if !loads(p.Value.Value(), files) {
			continue
		}
		since, err := c.GetUnitPropertyContext(ctx, s.Name, "InactiveExitTimestampMonotonic")
		if err != nil {
			continue
		}
		micros, _ := since.Value.Value().(uint64)
		all = append(all, Loader{Unit: s.Name, Since: time.Duration(micros) * time.Microsecond})
	}
	return all, nil
}

// loads tells whether systemd's LoadCredentialEncrypted, a(ss) of names and paths, has one of the files, or the folder
// of one.
func loads(value any, files []string) bool {
	pairs, _ := value.([][]any)
	for _, pair := range pairs {
		if len(pair) != 2 {
			continue
		}
		path, _ := pair[1].(string)
		path = filepath.Clean(path)
		if slices.ContainsFunc(files, func(file string) bool { return path == file || path == filepath.Dir(file) }) {
			return true
		}
	}
	return false
}

// Restart implements Host.
func (h *SystemdHost) Restart(ctx context.Context, units []string) (failed []string, err error) {
	if len(units) == 0 {
		return nil, nil
	}
	c, err := connect(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	ended := make(map[string]chan string, len(units))
	for _, u := range units {
		ended[u] = make(chan string, 1)
		if _, err := c.RestartUnitContext(ctx, u, "replace", ended[u]); err != nil {
			return nil, fmt.Errorf("systemd can't restart %s: %w", u, err)
		}
	}
	for _, u := range units {
		for {
			var result string
			select {
			case <-ctx.Done():
				return nil, fmt.Errorf("%s is not up again: %w", u, context.Cause(ctx))
			case result = <-ended[u]:
			case <-time.After(pollUnit):
			}
			s, err := statusOf(ctx, c, u)
			if err != nil {
				return nil, err
			}
			if result == "" && s.queued {
				continue
			}
			// Where it waits for its automatic restart it is neither up nor failed.
			if result != "" && result != "done" && result != "skipped" || s.failed() || s.sub == "auto-restart" {
				failed = append(failed, u)
			}
			break
		}
	}
	return failed, nil
}
