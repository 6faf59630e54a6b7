package provision

import (
	"context"
	"errors"
	"maps"
	"slices"
)

// Server is a machine as its provider knows it.
type Server struct {
	Name     string
	Provider string // "hetzner", or "self-hosted"
	ID       string // at the provider; "" where the machine is the owner's own
	Host     string // address or DNS name by which SSH reaches it; "" while it has none
	User     string // to log in as
	KeyFile  string // private key; "": the project's
	Type     string // of the machine, such as cpx21; "" where the provider has none
	Location string // such as hel1
	Status   string // the provider's word for how it is, such as running
	Managed  bool   // made by this program, for this fleet: its labels say so
}

// Order is which machines are wanted, and how they have to be. What is empty is the provider's default, or left out.
type Order struct {
	Fleet          string // which every machine is labelled with
	Names          []string
	Type           string
	Location       string
	Image          string
	PlacementGroup string // made where it is missing, of type spread
	Networks       []string
	Firewalls      []string
	Labels         map[string]string
	SSHKey         SSHKey
}

// SSHKey is the key pair that a new machine lets in.
type SSHKey struct {
	Name      string
	PublicKey string // a line as authorized_keys has them
}

// Plan is what carrying out an order would make, for people to look at beforehand.
type Plan struct {
	Existing []Server
	Missing  []PlannedServer
	Other    []string // what else would be made, such as "placement group web (spread)"
	Monthly  string   // the price of what is missing, such as "14.30 EUR a month"; "" where it costs nothing
}

// PlannedServer is a machine that is to be made.
type PlannedServer struct {
	Name, Type, Location, Image string
	Monthly                     string // such as "4.77 EUR"
}

// Provider is where machines come from. Its methods may be called concurrently.
type Provider interface {
	// Name is what --provider calls it.
	Name() string

	// Servers are the machines of these names, or all that it has without any; names that it does not know are left out.
	Servers(ctx context.Context, names ...string) ([]Server, error)

	// Plan says what Create would make, and makes nothing. Where it can't make what is missing, it says so as an error.
	Plan(ctx context.Context, o Order) (*Plan, error)

	// Create makes what is missing of an order, and waits until it runs; what exists is taken as it is. It gives all
	// machines of the order, in its order. What an earlier run began is found by its name and label, and finished. Where only
	// some could not be made, the error is a ServerErrors, and the others are given.
	Create(ctx context.Context, o Order, step func(server, what string)) ([]Server, error)

	// Destroy deletes a machine, and waits until it is gone. One that is gone already is no error. Providers that can't
	// delete machines give ErrOwners.
	Destroy(ctx context.Context, s Server, step func(what string)) error

	// AddKey keeps a public key for machines that are made later, and says whether it is new there. Another key under
	// that name is an error; providers that keep none give ErrOwners.
	AddKey(ctx context.Context, k SSHKey) (bool, error)

	// RemoveKey forgets the key of that name, and says whether there was one.
	RemoveKey(ctx context.Context, name string) (bool, error)
}

// ServerErrors are what kept machines from being made, by their names.
type ServerErrors map[string]error

func (e ServerErrors) Error() string {
	var all []error
	for _, name := range slices.Sorted(maps.Keys(e)) {
		all = append(all, e[name])
	}
	return errors.Join(all...).Error()
}
