package hetzner

import (
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hetznercloud/hcloud-go/v2/hcloud"
	"github.com/hetznercloud/hcloud-go/v2/hcloud/schema"
)

type server struct {
	schema.Server
	group int64

	// Whoever boots it or removes it writes the error, then closes the channel.
	booted              chan struct{}
	bootErr, removedErr error
}

var hostName = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?$`)

func (f *Fake) server(id int64) *server {
	i := slices.IndexFunc(f.servers, func(s *server) bool { return s.ID == id })
	if i < 0 {
		return nil
	}
	return f.servers[i]
}

// shown is a server as the API has it.
func (f *Fake) shown(s *server) schema.Server {
	out := s.Server
	out.Locked = f.busy(s)
	for _, g := range f.groupsShown() {
		if g.ID == s.group {
			out.PlacementGroup = &g
		}
	}
	return out
}

func (f *Fake) listServers(query url.Values) (answer, *refusal) {
	var all []schema.Server
	for _, s := range f.servers {
		if !query.Has("status") || slices.Contains(query["status"], s.Status) {
			all = append(all, f.shown(s))
		}
	}
	return list(f, query, "servers", all, func(s schema.Server) (string, map[string]string) { return s.Name, s.Labels })
}

func (f *Fake) getServer(id int64) (answer, *refusal) {
	s := f.server(id)
	if s == nil {
		return answer{}, notFound("server")
	}
	return answer{http.StatusOK, schema.ServerGetResponse{Server: f.shown(s)}}, nil
}

// named finds what an id or a name means.
func named[T any](wanted schema.IDOrName, all []T, called func(T) (int64, string)) (T, bool) {
	for _, t := range all {
		if id, name := called(t); id == wanted.ID || wanted.Name != "" && (name == wanted.Name || strconv.FormatInt(id, 10) == wanted.Name) {
			return t, true
		}
	}
	var none T
	return none, false
}

func (f *Fake) createServer(r schema.ServerCreateRequest) (answer, *refusal) {
	s := &server{group: r.PlacementGroup}
	kind, kindKnown := named(r.ServerType, f.serverTypes(), func(t schema.ServerType) (int64, string) { return t.ID, t.Name })
	image, imageKnown := named(r.Image, imagesFor(kind.Architecture), func(i schema.Image) (int64, string) { return i.ID, *i.Name })
	location, locationKnown := named(schema.IDOrName{Name: r.Location}, locations, func(l schema.Location) (int64, string) { return l.ID, l.Name })
	at := slices.IndexFunc(kind.Locations, func(l schema.ServerTypeLocation) bool { return l.Name == location.Name })
	labels := map[string]string{}
	if r.Labels != nil {
		labels = *r.Labels
	}
	switch {
	case !hostName.MatchString(r.Name):
		return answer{}, invalid("name", "must be a valid hostname")
	case slices.ContainsFunc(f.servers, func(s *server) bool { return s.Name == r.Name }):
		return answer{}, taken("name", "server name is already used")
	case !kindKnown:
		return answer{}, invalid("server_type", "server type not found")
	case !locationKnown:
		return answer{}, invalid("location", "location '%s' not found", r.Location)
	case at < 0 || f.unavailable(kind.Locations[at].Deprecation):
		return answer{}, refused(http.StatusUnprocessableEntity, "invalid_input", "unsupported location for server type")
	case !imageKnown:
		return answer{}, invalid("image", "image not found for this architecture")
	case !kind.Locations[at].Available:
		return answer{}, refused(http.StatusPreconditionFailed, "resource_unavailable", "error during placement")
	case f.options.ServerLimit > 0 && len(f.servers) >= f.options.ServerLimit:
		r := refused(http.StatusForbidden, "resource_limit_exceeded", "server limit exceeded")
		r.details = map[string]any{"limits": []map[string]any{{"name": "server_limit"}}}
		return answer{}, r
	}
	if err := checkLabels(labels); err != nil {
		return answer{}, err
	}
	authorized, err := f.attach(s, r)
	if err != nil {
		return answer{}, err
	}
	s.Server = schema.Server{
		ID: f.id(), Name: r.Name, Status: "initializing", Created: f.now, ServerType: kind, Location: location, Image: &image, Labels: labels,
		PublicNet: s.PublicNet, PrivateNet: s.PrivateNet, Volumes: []int64{}, LoadBalancers: []int64{}, PrimaryDiskSize: kind.Disk,
	}
	if err := f.makeMachine(s, authorized, r.PublicNet == nil || r.PublicNet.EnableIPv4); err != nil {
		return answer{}, err
	}
	f.servers = append(f.servers, s)
	create := f.begin(s, "create_server", nil, nil, func() { s.Status = "off" })
	start := f.start(s, create)
	return answer{http.StatusCreated, schema.ServerCreateResponse{Server: f.shown(s), Action: create.Action, NextActions: []schema.Action{start.Action}}}, nil
}

// attach looks up what a new server is to be attached to, and returns the keys that it lets in.
func (f *Fake) attach(s *server, r schema.ServerCreateRequest) (authorized string, _ *refusal) {
	for _, id := range r.SSHKeys {
		i := slices.IndexFunc(f.keys, func(k schema.SSHKey) bool { return k.ID == id })
		if i < 0 {
			return "", notFound("ssh_key")
		}
		authorized += f.keys[i].PublicKey + "\n"
	}
	for _, id := range r.Networks {
		i := slices.IndexFunc(f.networks, func(n schema.Network) bool { return n.ID == id })
		if i < 0 {
			return "", notFound("network")
		}
		s.PrivateNet = append(s.PrivateNet, schema.ServerPrivateNet{Network: id, AliasIPs: []string{}})
	}
	for _, w := range r.Firewalls {
		if !slices.ContainsFunc(f.firewalls, func(have schema.Firewall) bool { return have.ID == w.Firewall }) {
			return "", notFound("firewall")
		}
		s.PublicNet.Firewalls = append(s.PublicNet.Firewalls, schema.ServerFirewall{ID: w.Firewall, Status: "applied"})
	}
	if s.group == 0 {
		return authorized, nil
	}
	for _, g := range f.groupsShown() {
		if g.ID == s.group {
			if len(g.Servers) >= 10 {
				return "", refused(http.StatusUnprocessableEntity, "placement_error", "placement group contains already 10 servers")
			}
			return authorized, nil
		}
	}
	return "", notFound("placement_group")
}

// makeMachine gives a server its address, and a machine where there are machines.
func (f *Fake) makeMachine(s *server, authorized string, ipv4 bool) *refusal {
	s.PublicNet.IPv6 = schema.ServerPublicNetIPv6{ID: f.id(), IP: fmt.Sprintf("2001:db8:%x::/64", s.ID)}
	if ipv4 {
		s.PublicNet.IPv4 = schema.ServerPublicNetIPv4{ID: f.id(), IP: fmt.Sprintf("192.0.2.%d", s.ID%250+1)}
	}
	s.booted = make(chan struct{})
	if f.options.Machines == nil {
		close(s.booted)
		return nil
	}
	if before := f.removing[s.Name]; before != nil {
		<-before
	}
	ip, err := f.options.Machines.Make(s.Name, authorized)
	if err != nil {
		return refused(http.StatusInternalServerError, "server_error", "%v", err)
	}
	s.PublicNet.IPv4.IP = ip
	go func() {
		s.bootErr = f.options.Machines.Boot(s.Name)
		close(s.booted)
	}()
	return nil
}

// start starts a server when another action has ended.
func (f *Fake) start(s *server, after *action) *action {
	return f.begin(s, "start_server", after, func() (bool, error) {
		select {
		case <-s.booted:
			return true, s.bootErr
		default:
			return false, nil
		}
	}, func() { s.Status = "running" })
}

func (f *Fake) powerOn(id int64) (answer, *refusal) {
	s := f.server(id)
	switch {
	case s == nil:
		return answer{}, notFound("server")
	case f.busy(s):
		return answer{}, refused(http.StatusLocked, "locked", "server is locked")
	}
	return answer{http.StatusCreated, schema.ServerActionPoweronResponse{Action: f.start(s, nil).Action}}, nil
}

func (f *Fake) deleteServer(id int64) (answer, *refusal) {
	s := f.server(id)
	switch {
	case s == nil:
		return answer{}, notFound("server")
	case f.busy(s):
		return answer{}, refused(http.StatusLocked, "locked", "server is locked")
	case s.Protection.Delete:
		return answer{}, refused(http.StatusLocked, "protected", "server deletion is protected")
	}
	removed := make(chan struct{})
	f.removing[s.Name] = removed
	go func() {
		if f.options.Machines != nil {
			<-s.booted
			s.removedErr = f.options.Machines.Remove(s.Name)
		}
		close(removed)
	}()
	// It is gone at once; what is waited for is the rest of it.
	f.servers = slices.DeleteFunc(f.servers, func(other *server) bool { return other == s })
	a := f.begin(s, "delete_server", nil, func() (bool, error) {
		select {
		case <-removed:
			return true, s.removedErr
		default:
			return false, nil
		}
	}, func() {})
	return answer{http.StatusOK, schema.ServerDeleteResponse{Action: a.Action}}, nil
}

// Protect protects a server against deletion, as people do in the console.
func (f *Fake) Protect(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.servers {
		if s.Name == name {
			s.Protection.Delete = true
		}
	}
}

func checkLabels(labels map[string]string) *refusal {
	untyped := map[string]any{}
	for key, value := range labels {
		untyped[key] = value
		if strings.HasPrefix(key, "hetzner.cloud/") {
			return invalid("labels", "prefix hetzner.cloud/ is reserved")
		}
	}
	if _, err := hcloud.ValidateResourceLabels(untyped); err != nil {
		return invalid("labels", "is not a valid label")
	}
	return nil
}
