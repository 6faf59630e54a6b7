package hetzner_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hetznercloud/hcloud-go/v2/hcloud"

	"github.com/nix-infra/nix-infra/cli/provision"
	provider "github.com/nix-infra/nix-infra/cli/provision/hetzner"
	"github.com/nix-infra/nix-infra/e2e/hetzner"
)

// bench is a fake, and the provider that works on it for the fleet home.
type bench struct {
	*testing.T
	*provider.Hetzner
	fake  *hetzner.Fake
	other *provider.Hetzner // for another fleet
	order provision.Order

	mu    sync.Mutex
	steps []string
}

func newBench(t *testing.T, o hetzner.Options) *bench {
	t.Helper()
	o.Token, o.Clock = token, ticking()
	b := &bench{T: t, fake: hetzner.New(o)}
	endpoint := serve(t, b.fake)
	var err error
	b.Hetzner, err = provider.New(provider.Options{Token: token, Fleet: "home", Endpoint: endpoint, Pace: soon})
	must(t, err)
	b.other, err = provider.New(provider.Options{Token: token, Fleet: "away", Endpoint: endpoint, Pace: soon})
	must(t, err)
	b.order = provision.Order{Fleet: "home", Names: []string{"n1", "n2", "n3"}, SSHKey: provision.SSHKey{Name: "nixinfra", PublicKey: newKey(t)}}
	return b
}

func (b *bench) step(server, what string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.steps = append(b.steps, server+": "+what)
}

func (b *bench) create() []provision.Server {
	b.Helper()
	servers, err := b.Create(b.Context(), b.order, b.step)
	must(b.T, err)
	return servers
}

// ordered is how many servers were ordered, in vain or not.
func (b *bench) ordered() int {
	n := 0
	for _, r := range b.fake.Log() {
		if r.Method == http.MethodPost && r.Path == "/v1/servers" {
			n++
		}
	}
	return n
}

// wrote is how many requests there were that change something.
func (b *bench) wrote() int {
	n := 0
	for _, r := range b.fake.Log() {
		if r.Method != http.MethodGet {
			n++
		}
	}
	return n
}

// failsWith wants an error of one line that has all of these.
func failsWith(t *testing.T, err error, wants ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("it succeeded; want an error with %q", wants)
		return
	}
	for _, want := range wants {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error lacks %q: %v", want, err)
		}
	}
}

func TestCreate(t *testing.T) {
	b := newBench(t, hetzner.Options{ActionTime: 200 * time.Millisecond, PerPage: 1})
	b.fake.AddNetwork("internal", "10.0.0.0/16")
	b.fake.AddNetwork("dmz", "10.1.0.0/16")
	b.fake.AddFirewall("web")
	b.order.PlacementGroup, b.order.Networks, b.order.Firewalls, b.order.Labels = "spread", []string{"dmz"}, []string{"web"}, map[string]string{"team": "ops"}

	plan, err := b.Plan(t.Context(), b.order)
	must(t, err)
	if b.wrote() != 0 {
		t.Error("a plan changed something")
	}
	// 5.99 and 0.52 a month, and a quarter of that in taxes.
	if len(plan.Missing) != 3 || plan.Missing[1] != (provision.PlannedServer{Name: "n2", Type: "cpx22", Location: "hel1", Image: "ubuntu-24.04", Monthly: "8.14 EUR"}) ||
		plan.Monthly != "24.41 EUR a month" || !slices.Equal(plan.Other, []string{"SSH key nixinfra", "placement group spread (spread)"}) {
		t.Errorf("the plan is %+v", plan)
	}

	servers := b.create()
	for i, s := range servers {
		if s.Name != b.order.Names[i] || !s.Managed || s.Host == "" || s.Status != "running" || s.User != "root" || s.Type != "cpx22" || s.Location != "hel1" || s.Provider != "hetzner" {
			t.Errorf("server %d is %+v", i, s)
		}
	}
	for _, s := range b.fake.Servers() {
		if s.Labels["nix-infra/fleet"] != "home" || s.Labels["nix-infra/node"] != s.Name || s.Labels["team"] != "ops" ||
			s.PlacementGroup == nil || s.PlacementGroup.Name != "spread" || len(s.PrivateNet) != 1 || len(s.PublicNet.Firewalls) != 1 {
			t.Errorf("%s was made as %+v", s.Name, s)
		}
	}
	if !slices.ContainsFunc(b.steps, func(s string) bool { return strings.HasPrefix(s, "n3: create_server ") && strings.HasSuffix(s, "%") }) {
		t.Errorf("no progress is told: %q", b.steps)
	}

	b.order.Names = append(b.order.Names, "n4")
	again := b.create()
	if b.ordered() != 4 || len(again) != 4 || again[0].ID != servers[0].ID {
		t.Errorf("with one more, %d were ordered in all, and there are %+v", b.ordered(), again)
	}
	plan, err = b.Plan(t.Context(), b.order)
	if err != nil || len(plan.Existing) != 4 || len(plan.Missing)+len(plan.Other) != 0 || plan.Monthly != "" {
		t.Errorf("of what exists the plan is %+v, %v", plan, err)
	}
}

// TestMistakes are orders that can't be carried out; each is told with what there is, before anything is made.
func TestMistakes(t *testing.T) {
	b := newBench(t, hetzner.Options{PerPage: 2})
	b.fake.AddNetwork("internal", "10.0.0.0/16")
	for what, c := range map[string]struct {
		change func(*provision.Order)
		want   []string
	}{
		"type":                  {func(o *provision.Order) { o.Type = "cx22" }, []string{"no server type cx22", "cax11, cpx22, cpx32, cx23"}},
		"not made":              {func(o *provision.Order) { o.Type = "cpx21" }, []string{"no server type cpx21", "cpx22"}},
		"not made there":        {func(o *provision.Order) { o.Type, o.Location = "cx23", "nbg1" }, []string{"server type cx23: it is not made at nbg1 any more", "cpx22"}},
		"elsewhere":             {func(o *provision.Order) { o.Type, o.Location = "cpx22", "ash" }, []string{"not made at ash, but at fsn1, nbg1, hel1", "at ash there are: ccx13, cpx11"}},
		"sold out":              {func(o *provision.Order) { o.Type = "ccx13" }, []string{"sold out at hel1"}},
		"location":              {func(o *provision.Order) { o.Location = "hel2" }, []string{"no location hel2", "ash, fsn1, hel1, nbg1"}},
		"image":                 {func(o *provision.Order) { o.Image = "ubuntu-8.04" }, []string{"no image ubuntu-8.04", "debian-13, rocky-9, ubuntu-24.04"}},
		"arm image":             {func(o *provision.Order) { o.Image, o.Type = "rocky-9", "cax11" }, []string{"no image rocky-9", "debian-13, ubuntu-24.04"}},
		"image of another kind": {func(o *provision.Order) { o.Image, o.Type = "205", "cax11" }, []string{"image 205 is for x86"}},
		"network":               {func(o *provision.Order) { o.Networks = []string{"intern"} }, []string{"no network intern", "there are: internal"}},
		"firewall":              {func(o *provision.Order) { o.Firewalls = []string{"web"} }, []string{"no firewall web", "there are: none"}},
		"group":                 {func(o *provision.Order) { o.PlacementGroup = "g"; o.Names = strings.Fields("a b c d e f g h i j k") }, []string{"more than the 10"}},
		"key":                   {func(o *provision.Order) { o.SSHKey.PublicKey = "no key" }, []string{"SSH key nixinfra", "is no key"}},
		"no key":                {func(o *provision.Order) { o.SSHKey.PublicKey = "" }, []string{"SSH key nixinfra", "is missing; nix-infra ssh-key create --name nixinfra makes it"}},
		"two at once":           {func(o *provision.Order) { o.Firewalls, o.Networks = []string{"web"}, []string{"dmz"} }, []string{"no network dmz", "no firewall web"}},
	} {
		t.Run(what, func(t *testing.T) {
			o := b.order
			c.change(&o)
			_, err := b.Plan(t.Context(), o)
			failsWith(t, err, c.want...)
			_, err = b.Create(t.Context(), o, b.step)
			failsWith(t, err, c.want...)
		})
	}
	if b.wrote() != 0 {
		t.Errorf("%d requests changed something", b.wrote())
	}
}

// TestDeprecated: what will not be made some day is made until then.
func TestDeprecated(t *testing.T) {
	b := newBench(t, hetzner.Options{})
	b.order.Type = "cpx32"
	if servers := b.create(); len(servers) != 3 || servers[0].Type != "cpx32" {
		t.Errorf("made were %+v", servers)
	}
}

func TestOthersServers(t *testing.T) {
	b := newBench(t, hetzner.Options{})
	c := client(t, b.fake, 0)
	opts := hcloud.ServerCreateOpts{Name: "n2", ServerType: &hcloud.ServerType{Name: "cx23"}, Image: &hcloud.Image{Name: "debian-13"}, Location: &hcloud.Location{Name: "fsn1"}}
	_, _, err := c.Server.Create(t.Context(), opts)
	must(t, err)

	// One that nobody labelled is taken as it is, and is said to be.
	servers := b.create()
	if servers[1].Managed || servers[1].Type != "cx23" || !servers[0].Managed || !slices.Contains(b.steps, "n2: it exists, and was not made by nix-infra for this fleet: taken as it is") {
		t.Errorf("servers %+v, steps %q", servers, b.steps)
	}
	// One of another fleet's is not.
	o := b.order
	o.Fleet, o.Names = "away", []string{"n1"}
	_, err = b.other.Create(t.Context(), o, b.step)
	failsWith(t, err, "n1", "belongs to the fleet home")
	found, err := b.other.Servers(t.Context(), "n1")
	must(t, err)
	failsWith(t, b.other.Destroy(t.Context(), found[0], func(string) {}), "belongs to the fleet home")
	if len(b.fake.Servers()) != 3 {
		t.Error("another fleet's server was deleted")
	}
}

// TestResume interrupts the making at several points; a second run finishes, and makes nothing twice.
func TestResume(t *testing.T) {
	for what, c := range map[string]struct {
		fault  hetzner.Fault
		action string // of n2, that fails
		wants  string // how the first run ends; "": well
		orders int
	}{
		"the second order is refused": {fault: hetzner.Fault{Method: "POST", Path: "/v1/servers", Status: 412, Code: "resource_unavailable", Message: "error during placement"},
			wants: "there is no room for it now", orders: 4},
		"an answer is lost":        {fault: hetzner.Fault{Method: "POST", Path: "/v1/servers", Status: 504, Code: "timeout", Message: "lost", Late: true}, orders: 4},
		"a key's answer is lost":   {fault: hetzner.Fault{Method: "POST", Path: "/v1/ssh_keys", Status: 504, Code: "timeout", Message: "lost", Late: true}, orders: 3},
		"a group's answer is lost": {fault: hetzner.Fault{Method: "POST", Path: "/v1/placement_groups", Status: 504, Code: "timeout", Message: "lost", Late: true}, orders: 3},
		"looking fails":            {fault: hetzner.Fault{Method: "GET", Path: "/v1/actions", Status: 403, Code: "maintenance", Message: "later"}, wants: "wait a few minutes", orders: 3},
		"it does not start":        {action: "start_server", wants: "n2: start_server failed: no power (server_error", orders: 3},
	} {
		t.Run(what, func(t *testing.T) {
			b := newBench(t, hetzner.Options{ActionTime: 10 * time.Millisecond})
			b.order.PlacementGroup = "spread"
			if c.action != "" {
				b.fake.FailAction("n2", c.action, "server_error", "no power")
			} else {
				b.fake.Fail(c.fault)
			}
			servers, err := b.Create(t.Context(), b.order, b.step)
			if c.wants == "" {
				must(t, err)
			} else {
				failsWith(t, err, c.wants)
				if len(servers) == 3 {
					t.Error("all servers are given all the same")
				}
				servers = b.create()
			}
			if len(servers) != 3 || b.ordered() != c.orders || len(b.fake.Servers()) != 3 {
				t.Errorf("%d servers were ordered, %d exist, %+v are given", b.ordered(), len(b.fake.Servers()), servers)
			}
			for _, s := range b.fake.Servers() {
				if s.Labels["nix-infra/fleet"] != "home" || s.Status != "running" {
					t.Errorf("%s has the labels %v and is %s", s.Name, s.Labels, s.Status)
				}
			}
		})
	}
}

func TestInterrupted(t *testing.T) {
	b := newBench(t, hetzner.Options{ActionTime: 200 * time.Millisecond})
	ctx, cancel := context.WithCancel(t.Context())
	_, err := b.Create(ctx, b.order, func(server, what string) {
		if strings.HasPrefix(what, "create_server") {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("interrupted, it ended with %v", err)
	}
	b.create()
	if b.ordered() != 3 {
		t.Errorf("%d servers were ordered", b.ordered())
	}
}

// TestStuck: a server whose making failed is not waited for.
func TestStuck(t *testing.T) {
	b := newBench(t, hetzner.Options{})
	b.fake.FailAction("n1", "create_server", "server_error", "no disk")
	_, err := b.Create(t.Context(), b.order, b.step)
	failsWith(t, err, "n1: create_server failed: no disk", "nix-infra destroy n1")
	_, err = b.Create(t.Context(), b.order, b.step)
	failsWith(t, err, `n1 is "initializing", and nothing is being done with it`, "nix-infra destroy n1")
}

func TestLimits(t *testing.T) {
	t.Run("requests", func(t *testing.T) {
		b := newBench(t, hetzner.Options{Requests: 3, Refill: 50 * time.Millisecond})
		b.create()
		if !slices.ContainsFunc(b.fake.Log(), func(r hetzner.Request) bool { return r.Status == http.StatusTooManyRequests }) {
			t.Error("the limit was never reached")
		}
	})
	t.Run("servers", func(t *testing.T) {
		b := newBench(t, hetzner.Options{ServerLimit: 2})
		servers, err := b.Create(t.Context(), b.order, b.step)
		failsWith(t, err, "n3", "the project's limit is reached")
		var each provision.ServerErrors
		if !errors.As(err, &each) || len(each) != 1 || each["n3"] == nil {
			t.Errorf("what kept which from being made is %v", each)
		}
		if len(servers) != 2 {
			t.Errorf("those that could be made are %+v", servers)
		}
	})
	for code, want := range map[string]string{"rate_limit_exceeded": "too many requests; wait a few minutes", "forbidden": "may only read", "token_readonly": "may only read",
		"unavailable": "wait a few minutes", "odd": "it broke (odd"} {
		t.Run(code, func(t *testing.T) {
			b := newBench(t, hetzner.Options{})
			b.fake.Fail(hetzner.Fault{Method: "GET", Path: "/v1/servers", Status: 500, Code: code, Message: "it broke", Times: 1000})
			_, err := b.Servers(t.Context())
			failsWith(t, err, "hetzner: list servers", want)
		})
	}
}

func TestToken(t *testing.T) {
	b := newBench(t, hetzner.Options{})
	wrong, err := provider.New(provider.Options{Token: "wrong", Fleet: "home", Endpoint: serve(t, b.fake), Pace: soon})
	must(t, err)
	_, err = wrong.Plan(t.Context(), b.order)
	failsWith(t, err, "it does not know the token in HCLOUD_TOKEN")
	_, err = provider.New(provider.Options{Token: "a", Endpoint: "http://api.example.org/v1"})
	failsWith(t, err, "the token would travel in clear")
	_, err = provider.New(provider.Options{Token: "a", Endpoint: "api.example.org"})
	failsWith(t, err, "is no URL")
	broken, err := provider.New(provider.Options{Token: "two\nlines", Endpoint: serve(t, b.fake)})
	must(t, err)
	_, err = broken.Servers(t.Context())
	failsWith(t, err, "token contains invalid characters")
}

func TestDestroyServer(t *testing.T) {
	b := newBench(t, hetzner.Options{ActionTime: 200 * time.Millisecond})
	servers := b.create()
	must(t, b.Destroy(t.Context(), servers[0], func(string) {}))
	must(t, b.Destroy(t.Context(), servers[0], func(string) {})) // gone already
	b.fake.Protect("n2")
	failsWith(t, b.Destroy(t.Context(), servers[1], func(string) {}), "it is protected; take the protection off")
	b.fake.Fail(hetzner.Fault{Method: "DELETE", Path: "/v1/servers/" + servers[2].ID, Status: 422, Code: "service_error", Message: "no hands"})
	failsWith(t, b.Destroy(t.Context(), servers[2], func(string) {}), "delete n3: no hands", "wait a few minutes")

	// One that is still being made is waited for.
	b.order.Names = []string{"n4"}
	ctx, cancel := context.WithCancel(t.Context())
	_, _ = b.Create(ctx, b.order, func(_, what string) {
		if strings.HasPrefix(what, "create_server") {
			cancel()
		}
	})
	found, err := b.Servers(t.Context(), "n4")
	must(t, err)
	var waited bool
	must(t, b.Destroy(t.Context(), found[0], func(what string) { waited = waited || strings.HasPrefix(what, "waiting") }))
	var left []string
	for _, s := range b.fake.Servers() {
		left = append(left, s.Name)
	}
	if !waited || !slices.Equal(left, []string{"n2", "n3"}) {
		t.Errorf("left are %v; it waited: %v", left, waited)
	}
}

func TestKeys(t *testing.T) {
	b := newBench(t, hetzner.Options{PerPage: 1})
	mine := provision.SSHKey{Name: "ops", PublicKey: newKey(t)}
	for i, want := range []bool{true, false} {
		if added, err := b.AddKey(t.Context(), mine); err != nil || added != want {
			t.Errorf("time %d: added %v, %v", i, added, err)
		}
	}
	for i := range 3 {
		_, err := b.AddKey(t.Context(), provision.SSHKey{Name: fmt.Sprintf("k%d", i), PublicKey: newKey(t)})
		must(t, err)
	}
	// The same key under another name is there already, on whatever page; another key under its name is a mistake.
	if added, err := b.AddKey(t.Context(), provision.SSHKey{Name: "other", PublicKey: mine.PublicKey + " with a comment"}); err != nil || added {
		t.Errorf("added %v, %v", added, err)
	}
	_, err := b.AddKey(t.Context(), provision.SSHKey{Name: "ops", PublicKey: newKey(t)})
	failsWith(t, err, "another SSH key called ops", "nix-infra ssh-key remove --name ops")
	for i, want := range []bool{true, false} {
		if removed, err := b.RemoveKey(t.Context(), "k2"); err != nil || removed != want {
			t.Errorf("time %d: removed %v, %v", i, removed, err)
		}
	}
}
