// Package hetzner has machines made at Hetzner Cloud.
//
// Start here: New gives a provision.Provider. order.go finds out what an order means there and what it costs,
// create.go makes it, destroy.go deletes, keys.go keeps SSH keys.
package hetzner

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/hetznercloud/hcloud-go/v2/hcloud"

	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/protocol"
)

// Name is what --provider calls it.
const Name = "hetzner"

// The labels by which a fleet's machines are known.
const (
	FleetLabel = "nix-infra/fleet"
	NodeLabel  = "nix-infra/node"
)

// What is meant where an order does not say.
const (
	DefaultLocation = "hel1"
	DefaultType     = "cpx22"
	DefaultImage    = "ubuntu-24.04"
)

// Options say whose machines, and where the API is.
type Options struct {
	Token    string
	Fleet    string
	Endpoint string             // of the API, with its version, such as https://api.hetzner.cloud/v1, which is the default
	Pace     hcloud.BackoffFunc // between two tries of a request, and two looks at what is being made; nil: as the API likes it
}

// Hetzner is a project at Hetzner Cloud, which the token stands for.
type Hetzner struct {
	api   *hcloud.Client
	fleet string
	pace  hcloud.BackoffFunc // between two looks
}

// requestTime bounds one request to the API; it answers within a second or two.
const requestTime = 30 * time.Second

// backoff is the time before a request is sent again that was one too many, or that met an API in trouble: twice as long
// each time, up to half a minute. An exhausted limit refills by one request a second.
var backoff = hcloud.ExponentialBackoffWithOpts(hcloud.ExponentialBackoffOpts{Base: time.Second, Multiplier: 2, Cap: 30 * time.Second, Jitter: true})

// retries are as many as take about two minutes.
const retries = 8

// pollTime is between two looks at what is being made: often at first, and rarely for what takes long, as each look
// counts against the limit of requests.
var pollTime = hcloud.ExponentialBackoffWithOpts(hcloud.ExponentialBackoffOpts{Base: 500 * time.Millisecond, Multiplier: 1.3, Cap: 5 * time.Second})

// New opens the API. It asks nothing yet.
func New(o Options) (*Hetzner, error) {
	h := &Hetzner{fleet: o.Fleet, pace: pollTime}
	retryTime := backoff
	if o.Pace != nil {
		h.pace, retryTime = o.Pace, o.Pace
	}
	options := []hcloud.ClientOption{
		hcloud.WithToken(o.Token), hcloud.WithApplication("nix-infra", protocol.Build()),
		hcloud.WithHTTPClient(&http.Client{Timeout: requestTime}),
		hcloud.WithRetryOpts(hcloud.RetryOpts{BackoffFunc: retryTime, MaxRetries: retries}),
		hcloud.WithPollOpts(hcloud.PollOpts{BackoffFunc: h.pace}),
	}
	if o.Endpoint != "" {
		if err := checkEndpoint(o.Endpoint); err != nil {
			return nil, err
		}
		options = append(options, hcloud.WithEndpoint(o.Endpoint))
	}
	h.api = hcloud.NewClient(options...)
	return h, nil
}

// checkEndpoint keeps the token from travelling in clear.
func checkEndpoint(endpoint string) error {
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return fmt.Errorf("HCLOUD_ENDPOINT %q is no URL; expected such as %s", endpoint, hcloud.Endpoint)
	}
	if ip := net.ParseIP(u.Hostname()); u.Scheme == "http" && (ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("HCLOUD_ENDPOINT %s: the token would travel in clear; use https, or an address of this machine", endpoint)
	}
	return nil
}

// Name is Name.
func (h *Hetzner) Name() string { return Name }

// Servers are those of the project at Hetzner, whoever made them.
func (h *Hetzner) Servers(ctx context.Context, names ...string) ([]provision.Server, error) {
	all, err := h.api.Server.All(ctx)
	if err != nil {
		return nil, explain("list servers", err)
	}
	var servers []provision.Server
	for _, s := range all {
		if len(names) == 0 || slices.Contains(names, s.Name) {
			servers = append(servers, h.server(s))
		}
	}
	return servers, nil
}

func (h *Hetzner) server(s *hcloud.Server) provision.Server {
	found := provision.Server{
		Name: s.Name, Provider: Name, ID: strconv.FormatInt(s.ID, 10), User: "root", Status: string(s.Status),
		Managed: s.Labels[FleetLabel] == h.fleet && s.Labels[NodeLabel] == s.Name,
	}
	switch {
	case !s.PublicNet.IPv4.IsUnspecified():
		found.Host = s.PublicNet.IPv4.IP.String()
	case !s.PublicNet.IPv6.IsUnspecified():
		first := slices.Clone(s.PublicNet.IPv6.IP.To16()) // the machine has the first address of its network
		first[15]++
		found.Host = first.String()
	}
	if s.ServerType != nil {
		found.Type = s.ServerType.Name
	}
	if s.Location != nil {
		found.Location = s.Location.Name
	}
	return found
}

// foreign is why a machine can't be taken for one of this fleet's, or nil. One that nobody labelled can: people have made
// machines by hand, and with the earlier tool.
func (h *Hetzner) foreign(s *hcloud.Server) error {
	if fleet := s.Labels[FleetLabel]; fleet != "" && fleet != h.fleet {
		return fmt.Errorf("%s at Hetzner belongs to the fleet %s, as its label %s says; choose another name", s.Name, fleet, FleetLabel)
	}
	return nil
}

// explain says what was asked of the API, and for its common refusals what to do.
func explain(what string, err error) error {
	var refused hcloud.Error
	var unreached *url.Error
	switch {
	case errors.As(err, &unreached) && !errors.Is(err, context.Canceled):
		return fmt.Errorf("hetzner: %s: %w; check this machine's way to the internet, and run this again", what, err)
	case !errors.As(err, &refused):
		return fmt.Errorf("hetzner: %s: %w", what, err)
	}
	const readOnly = "the token in HCLOUD_TOKEN may only read; make one that may write, too"
	const later = "wait a few minutes and run this again, it goes on where it was; https://status.hetzner.com tells of troubles there"
	advice := map[hcloud.ErrorCode]string{
		hcloud.ErrorCodeUnauthorized:          "it does not know the token in HCLOUD_TOKEN; make one in the Cloud Console (Security, API tokens)",
		hcloud.ErrorCodeForbidden:             readOnly,
		"token_readonly":                      readOnly,
		hcloud.ErrorCodeRateLimitExceeded:     "too many requests; wait a few minutes and run this again, it goes on where it was",
		hcloud.ErrorCodeMaintenance:           later,
		hcloud.ErrorCodeServiceError:          later,
		hcloud.ErrorCodeServerError:           later,
		hcloud.ErrorCodeBadGateway:            later,
		hcloud.ErrorCodeTimeout:               later,
		hcloud.ErrorCodeConflict:              later,
		"unavailable":                         later,
		hcloud.ErrorCodeLocked:                "something else is being done with it; wait for that and run this again",
		hcloud.ErrorCodeResourceLocked:        "Hetzner has locked it; ask their support",
		hcloud.ErrorCodeResourceLimitExceeded: "the project's limit is reached; have Hetzner raise it, or delete what is not needed",
		hcloud.ErrorCodeResourceUnavailable:   "there is no room for it now; try another --location or --machine-type, or later",
		hcloud.ErrorCodePlacementError:        "no room is left for the placement group there; try another --location, or later",
		hcloud.ErrorCodeProtected:             "it is protected; take the protection off in the Cloud Console",
	}[refused.Code]
	if advice == "" {
		return fmt.Errorf("hetzner: %s: %w", what, err)
	}
	return fmt.Errorf("hetzner: %s: %w: %s", what, err, advice)
}
