package hetzner_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hetznercloud/hcloud-go/v2/hcloud"
	"golang.org/x/crypto/ssh"

	"github.com/nix-infra/nix-infra/e2e/hetzner"
)

const token = "secret"

// serve serves a fake on this machine, and returns its endpoint.
func serve(t *testing.T, f *hetzner.Fake) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go f.Serve(t.Context(), l)
	return "http://" + l.Addr().String() + "/v1"
}

// soon is the pace of these tests.
func soon(int) time.Duration { return 5 * time.Millisecond }

// ticking is a clock that goes by requests, ten milliseconds each: how fast this machine is has no part in what happens.
func ticking() func() time.Time {
	now := time.Now()
	return func() time.Time {
		now = now.Add(10 * time.Millisecond)
		return now
	}
}

func client(t *testing.T, f *hetzner.Fake, retries int) *hcloud.Client {
	t.Helper()
	return hcloud.NewClient(hcloud.WithEndpoint(serve(t, f)), hcloud.WithToken(token),
		hcloud.WithPollOpts(hcloud.PollOpts{BackoffFunc: soon}), hcloud.WithRetryOpts(hcloud.RetryOpts{BackoffFunc: soon, MaxRetries: retries}))
}

func newKey(t *testing.T) string {
	t.Helper()
	public, _, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	key, err := ssh.NewPublicKey(public)
	must(t, err)
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestRealClient has the real client make, list and delete servers: what it can't read would be an error of its own.
func TestRealClient(t *testing.T) {
	f := hetzner.New(hetzner.Options{Token: token, Clock: ticking(), ActionTime: 20 * time.Millisecond, PerPage: 2})
	f.AddNetwork("internal", "10.0.0.0/16")
	f.AddFirewall("web")
	c, ctx := client(t, f, 0), t.Context()

	key, _, err := c.SSHKey.Create(ctx, hcloud.SSHKeyCreateOpts{Name: "ops", PublicKey: newKey(t)})
	must(t, err)
	group, _, err := c.PlacementGroup.Create(ctx, hcloud.PlacementGroupCreateOpts{Name: "spread", Type: hcloud.PlacementGroupTypeSpread})
	must(t, err)
	networks, err := c.Network.All(ctx)
	must(t, err)
	firewalls, err := c.Firewall.All(ctx)
	must(t, err)
	opts := hcloud.ServerCreateOpts{
		ServerType: &hcloud.ServerType{Name: "cpx22"}, Image: &hcloud.Image{Name: "ubuntu-24.04"}, Location: &hcloud.Location{Name: "hel1"},
		SSHKeys: []*hcloud.SSHKey{key}, PlacementGroup: group.PlacementGroup, Networks: networks,
		Firewalls: []*hcloud.ServerCreateFirewall{{Firewall: *firewalls[0]}}, Labels: map[string]string{"a/b": "c"},
	}
	for i := range 5 {
		opts.Name = fmt.Sprintf("s%d", i)
		made, _, err := c.Server.Create(ctx, opts)
		must(t, err)
		if made.Action.Command != "create_server" || made.Server.Status != hcloud.ServerStatusInitializing || made.Server.PublicNet.IPv4.IP == nil {
			t.Fatalf("made %+v by %+v", made.Server, made.Action)
		}
		must(t, c.Action.WaitFor(ctx, append(made.NextActions, made.Action)...))
	}
	all, err := c.Server.All(ctx)
	must(t, err)
	var names []string
	for _, s := range all {
		names = append(names, s.Name)
		if s.Status != hcloud.ServerStatusRunning || s.ServerType.Name != "cpx22" || s.Location.Name != "hel1" || s.Image.Name != "ubuntu-24.04" ||
			s.PlacementGroup.ID != group.PlacementGroup.ID || len(s.PlacementGroup.Servers) != 5 || s.PrivateNet[0].Network.ID != networks[0].ID ||
			s.PublicNet.Firewalls[0].Firewall.ID != firewalls[0].ID || s.Labels["a/b"] != "c" {
			t.Errorf("%s is %+v", s.Name, s)
		}
	}
	if want := []string{"s0", "s1", "s2", "s3", "s4"}; !slices.Equal(names, want) {
		t.Errorf("over all pages there are %v, not %v", names, want)
	}
	for selector, want := range map[string]int{"a/b": 5, "a/b=c": 5, "a/b==c": 5, "a/b!=c": 0, "!a/b": 0, "x": 0, "a/b=c,!x": 5, "a/b=d": 0} {
		found, err := c.Server.AllWithOpts(ctx, hcloud.ServerListOpts{ListOpts: hcloud.ListOpts{LabelSelector: selector}})
		if err != nil || len(found) != want {
			t.Errorf("%s selects %d, %v; want %d", selector, len(found), err, want)
		}
	}
	s, _, err := c.Server.GetByName(ctx, "s3")
	must(t, err)
	deleted, _, err := c.Server.DeleteWithResult(ctx, s)
	must(t, err)
	if s, _, err = c.Server.GetByID(ctx, s.ID); s != nil || err != nil || deleted.Action.Status != hcloud.ActionStatusRunning {
		t.Errorf("while it is being deleted: %v, %v, %v", s, err, deleted.Action)
	}
	must(t, c.Action.WaitFor(ctx, deleted.Action))
	prices, _, err := c.Pricing.Get(ctx)
	must(t, err)
	if prices.Currency != "EUR" || len(prices.ServerTypes) == 0 || len(prices.PrimaryIPs) != 2 {
		t.Errorf("prices: %+v", prices)
	}
	arm, _, err := c.Image.GetForArchitecture(ctx, "debian-13", hcloud.ArchitectureARM)
	if err != nil || arm.Architecture != hcloud.ArchitectureARM {
		t.Errorf("image: %+v, %v", arm, err)
	}
	if _, err := c.SSHKey.Delete(ctx, key); err != nil {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	f := hetzner.New(hetzner.Options{Token: token, Clock: ticking(), ActionTime: time.Hour, ServerLimit: 2})
	c, ctx := client(t, f, 0), t.Context()
	create := func(name, kind, image, location string, change func(*hcloud.ServerCreateOpts)) error {
		opts := hcloud.ServerCreateOpts{Name: name, ServerType: &hcloud.ServerType{Name: kind}, Image: &hcloud.Image{Name: image}, Location: &hcloud.Location{Name: location}}
		if change != nil {
			change(&opts)
		}
		_, _, err := c.Server.Create(ctx, opts)
		return err
	}
	must(t, create("taken", "cpx22", "debian-13", "fsn1", nil))
	taken, _, err := c.Server.GetByName(ctx, "taken")
	must(t, err)
	_, _, lockedErr := c.Server.DeleteWithResult(ctx, taken)
	_, _, keyErr := c.SSHKey.Create(ctx, hcloud.SSHKeyCreateOpts{Name: "k", PublicKey: "none"})
	same := newKey(t)
	_, _, err = c.SSHKey.Create(ctx, hcloud.SSHKeyCreateOpts{Name: "k1", PublicKey: same})
	must(t, err)
	_, _, sameErr := c.SSHKey.Create(ctx, hcloud.SSHKeyCreateOpts{Name: "k2", PublicKey: same})
	// The statuses are those of the documentation.
	for what, got := range map[string]struct {
		err    error
		code   hcloud.ErrorCode
		status int
	}{
		"name taken":       {create("taken", "cpx22", "debian-13", "fsn1", nil), hcloud.ErrorCodeUniquenessError, 409},
		"bad name":         {create("a_b", "cpx22", "debian-13", "fsn1", nil), hcloud.ErrorCodeInvalidInput, 422},
		"unknown type":     {create("a", "cpx999", "debian-13", "fsn1", nil), hcloud.ErrorCodeInvalidInput, 422},
		"unknown image":    {create("a", "cpx22", "beos", "fsn1", nil), hcloud.ErrorCodeInvalidInput, 422},
		"unknown location": {create("a", "cpx22", "debian-13", "moon1", nil), hcloud.ErrorCodeInvalidInput, 422},
		"not made there":   {create("a", "cpx22", "debian-13", "ash", nil), hcloud.ErrorCodeInvalidInput, 422},
		"sold out":         {create("a", "ccx13", "debian-13", "hel1", nil), hcloud.ErrorCodeResourceUnavailable, 412},
		"reserved label": {create("a", "cpx22", "debian-13", "fsn1", func(o *hcloud.ServerCreateOpts) { o.Labels = map[string]string{"hetzner.cloud/x": ""} }),
			hcloud.ErrorCodeInvalidInput, 422},
		"no such network":    {create("a", "cpx22", "debian-13", "fsn1", func(o *hcloud.ServerCreateOpts) { o.Networks = []*hcloud.Network{{ID: 4711}} }), hcloud.ErrorCodeNotFound, 404},
		"locked":             {lockedErr, hcloud.ErrorCodeLocked, 423},
		"not made any more":  {create("a", "cpx21", "debian-13", "fsn1", nil), hcloud.ErrorCodeInvalidInput, 422},
		"not there any more": {create("a", "cx23", "debian-13", "nbg1", nil), hcloud.ErrorCodeInvalidInput, 422},
		"key known":          {sameErr, hcloud.ErrorCodeUniquenessError, 409},
		"no key":             {keyErr, hcloud.ErrorCodeInvalidInput, 422},
		"limit": {func() error {
			must(t, create("b", "cx23", "debian-13", "fsn1", nil))
			return create("c", "cx23", "debian-13", "fsn1", nil)
		}(), hcloud.ErrorCodeResourceLimitExceeded, 403},
		"wrong token": {func() error {
			_, err := hcloud.NewClient(hcloud.WithEndpoint(serve(t, f)), hcloud.WithToken("wrong")).Server.All(ctx)
			return err
		}(), hcloud.ErrorCodeUnauthorized, 401},
	} {
		var refused hcloud.Error
		if !errors.As(got.err, &refused) || refused.Code != got.code || refused.Response().StatusCode != got.status {
			t.Errorf("%s: %v, not %s (%d)", what, got.err, got.code, got.status)
		}
	}
}

func TestRequestLimit(t *testing.T) {
	f := hetzner.New(hetzner.Options{Token: token, Clock: ticking(), Requests: 2, Refill: 100 * time.Millisecond})
	impatient, ctx := client(t, f, 0), t.Context()
	var err error
	var response *hcloud.Response
	for range 3 {
		_, response, err = impatient.Location.GetByName(ctx, "hel1")
	}
	if !hcloud.IsError(err, hcloud.ErrorCodeRateLimitExceeded) || response.StatusCode != http.StatusTooManyRequests ||
		response.Meta.Ratelimit.Limit != 2 || response.Meta.Ratelimit.Remaining != 0 || response.Meta.Ratelimit.Reset.IsZero() {
		t.Errorf("the third at once: %v", err)
	}
	patient := client(t, f, 100)
	for range 3 {
		if _, _, err := patient.Location.GetByName(ctx, "hel1"); err != nil {
			t.Errorf("with patience: %v", err)
		}
	}
}

func TestFaults(t *testing.T) {
	f := hetzner.New(hetzner.Options{Token: token, Clock: ticking(), ActionTime: 10 * time.Millisecond})
	c, ctx := client(t, f, 0), t.Context()
	opts := hcloud.ServerCreateOpts{Name: "s", ServerType: &hcloud.ServerType{Name: "cpx22"}, Image: &hcloud.Image{Name: "debian-13"}, Location: &hcloud.Location{Name: "fsn1"}}

	f.Fail(hetzner.Fault{Method: "POST", Path: "/v1/servers", Status: http.StatusForbidden, Code: "maintenance", Message: "later"})
	if _, _, err := c.Server.Create(ctx, opts); !hcloud.IsError(err, hcloud.ErrorCodeMaintenance) || len(f.Servers()) != 0 {
		t.Errorf("%v, %d servers", err, len(f.Servers()))
	}
	f.Fail(hetzner.Fault{Method: "POST", Path: "/v1/servers", Status: http.StatusGatewayTimeout, Code: "timeout", Message: "lost", Late: true})
	if _, _, err := c.Server.Create(ctx, opts); !hcloud.IsError(err, hcloud.ErrorCodeTimeout) || len(f.Servers()) != 1 {
		t.Errorf("the answer that is lost: %v, %d servers", err, len(f.Servers()))
	}
	opts.Name = "t"
	f.FailAction("t", "create_server", "server_error", "no disk")
	made, _, err := c.Server.Create(ctx, opts)
	must(t, err)
	if err := c.Action.WaitFor(ctx, made.Action); err == nil || !strings.Contains(err.Error(), "no disk (server_error") {
		t.Errorf("the action ended with %v", err)
	}
	if err := c.Action.WaitFor(ctx, made.NextActions...); err == nil {
		t.Error("what comes after an action that failed succeeded")
	}
	if log := f.Log(); log[0].Status != http.StatusForbidden || log[0].Path != "/v1/servers" {
		t.Errorf("the log begins with %+v", log[0])
	}
}
