package provision

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nix-infra/nix-infra/cli/project"
)

// SelfHostedName is what --provider calls the machines that are in servers.yaml.
const SelfHostedName = "self-hosted"

// ErrOwners is that a machine can't be deleted, because it is nobody's to delete but its owner's.
var ErrOwners = errors.New("the machine is its owner's own; nix-infra neither makes nor deletes it")

// SelfHosted are the machines of servers.yaml. Those that name a cloud instead of an address are that cloud's: looked up
// there by name, and made there where they are missing.
type SelfHosted struct {
	dir     string // of the project
	servers []project.Server
	cloud   func() (Provider, error)
}

// Name is SelfHostedName.
func (*SelfHosted) Name() string { return SelfHostedName }

// Servers gives what is listed.
func (h *SelfHosted) Servers(ctx context.Context, names ...string) ([]Server, error) {
	var own, found []Server
	var theirs []string
	for _, e := range h.servers {
		switch {
		case len(names) > 0 && !slices.Contains(names, e.Name):
		case e.Provider == "":
			own = append(own, Server{Name: e.Name, Provider: SelfHostedName, Host: e.IP, User: e.Username, KeyFile: h.keyFile(e)})
		default:
			theirs = append(theirs, e.Name)
		}
	}
	if len(theirs) > 0 {
		cloud, err := h.cloud()
		if err != nil {
			return nil, err
		}
		if found, err = cloud.Servers(ctx, theirs...); err != nil {
			return nil, err
		}
	}
	return h.inOrder(append(own, h.completed(found)...)), nil
}

// keyFile is the path of the private key of an entry.
func (h *SelfHosted) keyFile(e project.Server) string {
	if filepath.IsAbs(e.SSHKey) {
		return e.SSHKey
	}
	return filepath.Join(h.dir, e.SSHKey)
}

// entry is what is listed under a name.
func (h *SelfHosted) entry(name string) (project.Server, bool) {
	i := slices.IndexFunc(h.servers, func(e project.Server) bool { return e.Name == name })
	if i < 0 {
		return project.Server{}, false
	}
	return h.servers[i], true
}

// completed adds to a cloud's servers how their entries say that one logs in.
func (h *SelfHosted) completed(servers []Server) []Server {
	for i, s := range servers {
		if e, ok := h.entry(s.Name); ok {
			servers[i].User, servers[i].KeyFile = e.Username, h.keyFile(e)
		}
	}
	return servers
}

// inOrder sorts servers as they are listed.
func (h *SelfHosted) inOrder(servers []Server) []Server {
	at := func(s Server) int {
		return slices.IndexFunc(h.servers, func(e project.Server) bool { return e.Name == s.Name })
	}
	slices.SortFunc(servers, func(a, b Server) int { return at(a) - at(b) })
	return servers
}

// parts are the names of an order that are the owner's own, and the cloud's by the key that lets in there.
func (h *SelfHosted) parts(o Order) (own []string, theirs map[string][]string, err error) {
	theirs = map[string][]string{}
	var errs []error
	for _, name := range o.Names {
		e, ok := h.entry(name)
		switch {
		case !ok:
			errs = append(errs, fmt.Errorf("%s is not in %s; list it there with its ip, or with provider: hetzner to have it made", name, project.ServersFile))
		case e.Provider == "":
			own = append(own, name)
		default:
			key := h.keyFile(e)
			theirs[key] = append(theirs[key], name)
		}
	}
	return own, theirs, errors.Join(errs...)
}

// Plan says which of the cloud's machines are missing: others can't be.
func (h *SelfHosted) Plan(ctx context.Context, o Order) (*Plan, error) {
	own, theirs, err := h.parts(o)
	if err != nil {
		return nil, err
	}
	plan := &Plan{}
	if len(theirs) > 0 {
		cloud, err := h.cloud()
		if err != nil {
			return nil, err
		}
		o.Names = slices.DeleteFunc(slices.Clone(o.Names), func(name string) bool { return slices.Contains(own, name) })
		if plan, err = cloud.Plan(ctx, o); err != nil {
			return nil, err
		}
	}
	if len(own) > 0 {
		servers, err := h.Servers(ctx, own...)
		if err != nil {
			return nil, err
		}
		plan.Existing = h.inOrder(append(servers, h.completed(plan.Existing)...))
	}
	return plan, nil
}

// Create makes the cloud's machines that are missing, and lets in the key that their entries name.
func (h *SelfHosted) Create(ctx context.Context, o Order, step func(server, what string)) ([]Server, error) {
	own, theirs, err := h.parts(o)
	if err != nil {
		return nil, err
	}
	var servers []Server
	if len(own) > 0 {
		if servers, err = h.Servers(ctx, own...); err != nil {
			return nil, err
		}
	}
	failed := ServerErrors{}
	for _, key := range slices.Sorted(maps.Keys(theirs)) {
		part := o
		part.Names = theirs[key]
		made, err := h.createPart(ctx, part, key, step)
		servers = append(servers, h.completed(made)...)
		var each ServerErrors
		if errors.As(err, &each) {
			maps.Copy(failed, each)
		} else if err != nil {
			for _, name := range part.Names {
				failed[name] = err
			}
		}
	}
	slices.SortFunc(servers, func(a, b Server) int { return slices.Index(o.Names, a.Name) - slices.Index(o.Names, b.Name) })
	if len(failed) > 0 {
		return servers, failed
	}
	return servers, nil
}

// createPart makes machines of the cloud's that let in the public half of one key.
func (h *SelfHosted) createPart(ctx context.Context, o Order, keyFile string, step func(server, what string)) ([]Server, error) {
	cloud, err := h.cloud()
	if err != nil {
		return nil, err
	}
	if o.SSHKey, err = publicHalf(keyFile); err != nil {
		return nil, err
	}
	return cloud.Create(ctx, o, step)
}

// publicHalf reads the public half beside a private key.
func publicHalf(keyFile string) (SSHKey, error) {
	line, err := os.ReadFile(keyFile + ".pub")
	if err != nil {
		return SSHKey{}, fmt.Errorf("the public half of the ssh_key in %s, which a new machine is to let in: %w", project.ServersFile, err)
	}
	return SSHKey{Name: filepath.Base(keyFile), PublicKey: strings.TrimSpace(string(line))}, nil
}

// Destroy deletes a machine of the cloud's.
func (h *SelfHosted) Destroy(ctx context.Context, s Server, step func(what string)) error {
	if s.Provider == SelfHostedName {
		return ErrOwners
	}
	cloud, err := h.cloud()
	if err != nil {
		return err
	}
	return cloud.Destroy(ctx, s, step)
}

// keeper is the cloud that keeps keys, where a machine is a cloud's.
func (h *SelfHosted) keeper() (Provider, error) {
	if !slices.ContainsFunc(h.servers, func(e project.Server) bool { return e.Provider != "" }) {
		return nil, ErrOwners
	}
	return h.cloud()
}

// AddKey keeps a key at the cloud, for machines that are the cloud's. Where all are their owner's own, it is ErrOwners.
func (h *SelfHosted) AddKey(ctx context.Context, k SSHKey) (bool, error) {
	keeper, err := h.keeper()
	if err != nil {
		return false, err
	}
	return keeper.AddKey(ctx, k)
}

// RemoveKey forgets a key at the cloud.
func (h *SelfHosted) RemoveKey(ctx context.Context, name string) (bool, error) {
	keeper, err := h.keeper()
	if err != nil {
		return false, err
	}
	return keeper.RemoveKey(ctx, name)
}
