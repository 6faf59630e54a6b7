package command

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// nothingThere refuses names that mean nothing: nobody was ever revoked who was called so.
func (a *app) nothingThere(all []*doomed) error {
	record, err := a.readAccess()
	if err != nil {
		return err
	}
	var unknown []string
	for _, d := range all {
		revoked := slices.ContainsFunc(record.Grants, func(g grant) bool { return g.Name == d.name && g.Role == protocol.Node })
		if d.node == nil && d.server == nil && !revoked {
			unknown = append(unknown, d.name)
		}
	}
	if len(unknown) > 0 {
		return fmt.Errorf("there is no node and no server called %s; nothing was destroyed", strings.Join(unknown, ", "))
	}
	return nil
}

// confirmNames has the name of each machine typed, after what is worth knowing about it.
func (a *app) confirmNames(p *project.Project, all []*doomed) error {
	for _, d := range all {
		if d.node == nil && d.server == nil {
			continue
		}
		for _, text := range warnings(p, d) {
			a.note("WARNING: %s", ui.Clean(text))
		}
		if a.batch {
			continue
		}
		fmt.Fprintf(a.Stderr, "%s. Type its name to go on: ", ui.Clean(d.means()))
		switch answer, err := a.typed(); {
		case answer == d.name:
		case errors.Is(err, context.Canceled):
			return err
		case answer == "" && err != nil:
			return errors.New("nobody answered, and nothing was done; --batch goes on without asking")
		default:
			return errors.New("that is not its name; nothing was done")
		}
	}
	return nil
}

// means says in a sentence what is done to a machine.
func (d *doomed) means() string {
	var parts []string
	if d.node != nil {
		parts = append(parts, "is taken out of the fleet")
	}
	switch {
	case d.server == nil:
	case d.server.Provider == provision.SelfHostedName:
		parts = append(parts, "goes on running, as a machine of your own")
	default:
		what := strings.Join(strings.Fields(d.server.Provider+" "+d.server.Type+" "+d.server.Location+" "+d.server.Host), ", ")
		parts = append(parts, "is deleted with all that is on it ("+what+")")
	}
	return d.name + " " + strings.Join(parts, ", and ")
}

// isAt tells whether the URL of a controller leads to a machine, by its name or its address ("": not known).
func isAt(controller, name, address string) bool {
	u, err := url.Parse(controller)
	return err == nil && (u.Hostname() == name || address != "" && u.Hostname() == address)
}

// warnings are what people may not expect of a machine.
func warnings(p *project.Project, d *doomed) []string {
	var texts []string
	s := d.server
	if s != nil && s.Provider != provision.SelfHostedName && !s.Managed {
		texts = append(texts, fmt.Sprintf("%s was not made by nix-infra for this fleet, as its labels say: it is deleted because you name it", d.name))
	}
	if i := slices.IndexFunc(p.Settings.Controllers, func(url string) bool { return isAt(url, d.name, d.address(p.Settings)) }); i >= 0 {
		texts = append(texts, fmt.Sprintf("%s is a controller of this fleet (%s): without one, no node can be reached or deployed to", d.name, p.Settings.Controllers[i]))
	}
	if slices.Contains(p.Settings.Cluster.ControlNodes, d.name) {
		texts = append(texts, fmt.Sprintf("%s is a control node of the cluster: etcd loses a member, which has to be taken out of it, too", d.name))
	}
	return texts
}

// destroyedDocument is a machine in `destroy --json`.
type destroyedDocument struct {
	Name         string `json:"name"`
	Unregistered bool   `json:"unregistered"` // it was a node, and is none any more
	Provider     string `json:"provider"`     // "": there was no server
	Deleted      bool   `json:"deleted"`
	Error        string `json:"error,omitempty"`
}

// destroyed says what became of each.
func (a *app) destroyed(ctx context.Context, all []*doomed) error {
	var errs []error
	for _, d := range all {
		doc := destroyedDocument{Name: d.name, Unregistered: d.node != nil}
		var said []string
		if d.node != nil {
			said = append(said, "out of the fleet")
		}
		switch s := d.server; {
		case s == nil:
		case s.Provider == provision.SelfHostedName:
			doc.Provider = s.Provider
			said = append(said, "a machine of your own, which goes on running what it has")
		default:
			doc.Provider, doc.Deleted = s.Provider, d.err == nil
			said = append(said, map[bool]string{true: "deleted at ", false: "not deleted at "}[doc.Deleted]+s.Provider)
		}
		if d.err != nil {
			doc.Error = message(d.err)
			errs = append(errs, d.err)
		}
		if a.json {
			a.document(doc)
		}
		a.say("%s: %s\n", d.name, first(strings.Join(said, "; "), "there is nothing of it any more"))
	}
	switch {
	case len(errs) == 0:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return &outcome{SomeFailed, &errorList{fmt.Sprintf("%d of %d were not deleted; run the same command again:", len(errs), len(all)), errs}}
}
