// Package hetzner is a fake of the Hetzner Cloud API, the only part of the end-to-end tests that is not the real thing:
// real servers cost money and need the internet. It keeps to https://docs.hetzner.cloud, the codes and statuses of errors
// included, and answers in the types of hcloud-go's package schema: the real client talks to it, by its endpoint option. The
// texts of errors are the documented ones, or what people report from the real API; where neither was to be found, they are
// invented, and nothing should depend on them. The prices are invented, too.
//
// Start here: New makes one, Serve serves it. With Machines, the servers that are made are real machines. requests.go has
// what all requests have in common (token, limit of requests, errors on demand, pages), servers.go and actions.go what
// takes time, resources.go the rest, catalogue.go what can be bought.
//
// Not there: volumes, load balancers, floating and primary IPs of their own, certificates, zones, datacenters, metrics, the
// pages' Link header, root passwords, and changes to what exists but for starting a server.
package hetzner

import (
	"context"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/hetznercloud/hcloud-go/v2/hcloud/schema"
)

// Options say how the fake behaves.
type Options struct {
	Token       string           // the only one that is known
	ActionTime  time.Duration    // how long each action takes, at least
	PerPage     int              // the most entries of a page; zero means 50, as there
	Requests    int              // how many may be made at once; zero means 3600, as there
	Refill      time.Duration    // until one more may be made; zero means a second, as there
	ServerLimit int              // how many servers there may be; zero means no limit
	Clock       func() time.Time // asked once for each request; nil: the time that it is
	Machines    Machines         // what servers are; nil: nothing, and their addresses lead nowhere
}

// Machines are what the servers are. Its methods are not called concurrently for one machine.
type Machines interface {
	// Make makes a machine that lets root in with the keys, as authorized_keys has them, and returns its IPv4 address.
	Make(name, keys string) (string, error)
	// Boot starts it.
	Boot(name string) error
	// Remove takes it away, disk and all.
	Remove(name string) error
}

// Fake is a project at Hetzner Cloud.
type Fake struct {
	options Options

	mu        sync.Mutex
	now       time.Time // of the request that is being answered
	lastID    int64
	servers   []*server
	actions   []*action
	keys      []schema.SSHKey
	groups    []schema.PlacementGroup
	networks  []schema.Network
	firewalls []schema.Firewall
	faults    []*Fault
	failing   map[string]schema.ActionError // by server and command
	removing  map[string]<-chan struct{}    // by server: closed when its machine is gone
	bucket    float64                       // requests that may be made now
	filled    time.Time
	log       []Request
}

// Request is one that was made.
type Request struct {
	Method, Path string // without the query
	Status       int    // of the answer
}

// New makes an empty project.
func New(o Options) *Fake {
	if o.PerPage == 0 {
		o.PerPage = 50
	}
	if o.Requests == 0 {
		o.Requests = 3600
	}
	if o.Refill == 0 {
		o.Refill = time.Second
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	now := o.Clock()
	return &Fake{options: o, now: now, failing: map[string]schema.ActionError{}, removing: map[string]<-chan struct{}{}, bucket: float64(o.Requests), filled: now}
}

// Serve serves the API below /v1 until ctx ends. The listener is closed then.
func (f *Fake) Serve(ctx context.Context, l net.Listener) {
	s := &http.Server{Handler: f, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	_ = s.Serve(l) // it ends when it is closed
}

// Log is all requests so far.
func (f *Fake) Log() []Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]Request(nil), f.log...)
}

// Servers are the servers that there are, as the API has them.
func (f *Fake) Servers() []schema.Server {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.advance()
	var all []schema.Server
	for _, s := range f.servers {
		all = append(all, f.shown(s))
	}
	return all
}

// AddNetwork and AddFirewall make what people make by hand.
func (f *Fake) AddNetwork(name, ipRange string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.networks = append(f.networks, schema.Network{
		ID: f.id(), Name: name, Created: f.now, IPRange: ipRange, Labels: map[string]string{},
		Subnets: []schema.NetworkSubnet{{Type: "cloud", IPRange: ipRange, NetworkZone: "eu-central"}}, Routes: []schema.NetworkRoute{},
	})
}

// AddFirewall makes one without rules.
func (f *Fake) AddFirewall(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.firewalls = append(f.firewalls, schema.Firewall{ID: f.id(), Name: name, Created: f.now, Labels: map[string]string{}, Rules: []schema.FirewallRule{}})
}

// id is one that nothing else has.
func (f *Fake) id() int64 {
	f.lastID++
	return f.lastID
}
