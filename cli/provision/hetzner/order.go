package hetzner

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hetznercloud/hcloud-go/v2/hcloud"
	"github.com/hetznercloud/hcloud-go/v2/hcloud/schema"

	"github.com/nix-infra/nix-infra/cli/provision"
)

// order is what a provision.Order means at Hetzner.
type order struct {
	provision.Order
	existing  map[string]*hcloud.Server
	missing   []string
	kind      *hcloud.ServerType // these four are nil where nothing is missing
	location  *hcloud.Location
	image     *hcloud.Image
	group     *hcloud.PlacementGroup // nil too where there is none yet
	networks  []*hcloud.Network
	firewalls []*hcloud.Firewall
}

// groupSize is how many servers a placement group of type spread may have.
const groupSize = 10

// resolve looks up all that an order names. All that is not there is reported, with what is.
func (h *Hetzner) resolve(ctx context.Context, o provision.Order) (*order, error) {
	r := &order{Order: o, existing: map[string]*hcloud.Server{}}
	all, err := h.api.Server.All(ctx)
	if err != nil {
		return nil, explain("list servers", err)
	}
	var errs []error
	for _, s := range all {
		if slices.Contains(o.Names, s.Name) {
			r.existing[s.Name] = s
			errs = append(errs, h.foreign(s))
		}
	}
	for _, name := range o.Names {
		if r.existing[name] == nil {
			r.missing = append(r.missing, name)
		}
	}
	if len(r.missing) > 0 {
		errs = append(errs, r.findMachine(ctx, h.api), r.findGroup(ctx, h.api), r.findNetworks(ctx, h.api), r.findFirewalls(ctx, h.api))
	}
	return r, errors.Join(errs...)
}

// findMachine finds location, type and image, which depend on each other.
func (r *order) findMachine(ctx context.Context, api *hcloud.Client) error {
	locations, err := api.Location.All(ctx)
	if err != nil {
		return explain("list locations", err)
	}
	if r.location, err = pick("location", first(r.Location, DefaultLocation), locations, func(l *hcloud.Location) (string, int64) { return l.Name, l.ID }); err != nil {
		return err
	}
	types, err := api.ServerType.All(ctx)
	if err != nil {
		return explain("list server types", err)
	}
	current := slices.DeleteFunc(slices.Clone(types), func(t *hcloud.ServerType) bool { return soldAt(t, r.location.Name) != nil })
	byName := func(t *hcloud.ServerType) (string, int64) { return t.Name, t.ID }
	wanted := first(r.Type, DefaultType)
	if r.kind, err = pick("server type", wanted, types, byName); err != nil {
		_, err = pick("server type", wanted, current, byName) // what can be had is worth listing, and not what could be once
		return err
	}
	if err := soldAt(r.kind, r.location.Name); err != nil {
		return fmt.Errorf("hetzner: server type %s: %w; at %s there are: %s", wanted, err, r.location.Name, strings.Join(names(current, byName), ", "))
	}
	return r.findImage(ctx, api)
}

// soldAt is why new servers of a type can't be had at a location, or nil.
func soldAt(t *hcloud.ServerType, location string) error {
	if t.IsDeprecated() && t.UnavailableAfter().Before(time.Now()) {
		return errors.New("it is not made any more")
	}
	var at []string
	for _, l := range t.Locations {
		if l.Location == nil {
			continue
		}
		if l.Location.Name == location {
			if l.IsDeprecated() && l.UnavailableAfter().Before(time.Now()) {
				return fmt.Errorf("it is not made at %s any more", location)
			}
			if !l.Available {
				return fmt.Errorf("it is sold out at %s now", location)
			}
			return nil
		}
		at = append(at, l.Location.Name)
	}
	return fmt.Errorf("it is not made at %s, but at %s", location, first(strings.Join(at, ", "), "no location"))
}

func (r *order) findImage(ctx context.Context, api *hcloud.Client) error {
	wanted := first(r.Image, DefaultImage)
	var err error
	if r.image, _, err = api.Image.GetForArchitecture(ctx, wanted, r.kind.Architecture); err != nil {
		return explain("image "+wanted, err)
	}
	if r.image != nil && r.image.Architecture != r.kind.Architecture {
		return fmt.Errorf("hetzner: image %s is for %s, and the server type %s is %s", wanted, r.image.Architecture, r.kind.Name, r.kind.Architecture)
	}
	if r.image != nil {
		return nil
	}
	have, err := api.Image.AllWithOpts(ctx, hcloud.ImageListOpts{Type: []hcloud.ImageType{hcloud.ImageTypeSystem}, Architecture: []hcloud.Architecture{r.kind.Architecture}})
	if err != nil {
		return explain("list images", err)
	}
	_, err = pick("image", wanted, have, func(i *hcloud.Image) (string, int64) { return i.Name, i.ID })
	return err
}

func (r *order) findGroup(ctx context.Context, api *hcloud.Client) error {
	if r.PlacementGroup == "" {
		return nil
	}
	var err error
	if r.group, _, err = api.PlacementGroup.Get(ctx, r.PlacementGroup); err != nil {
		return explain("placement group "+r.PlacementGroup, err)
	}
	there := 0
	if r.group != nil {
		there = len(r.group.Servers)
	}
	if there+len(r.missing) > groupSize {
		return fmt.Errorf("hetzner: placement group %s: it has %d servers, and with %d more there would be more than the %d that a group can spread; use another group for the rest",
			r.PlacementGroup, there, len(r.missing), groupSize)
	}
	return nil
}

func (r *order) findNetworks(ctx context.Context, api *hcloud.Client) error {
	if len(r.Networks) == 0 {
		return nil
	}
	have, err := api.Network.All(ctx)
	if err != nil {
		return explain("list networks", err)
	}
	var errs []error
	for _, wanted := range r.Networks {
		n, err := pick("network", wanted, have, func(n *hcloud.Network) (string, int64) { return n.Name, n.ID })
		r.networks, errs = append(r.networks, n), append(errs, err)
	}
	return errors.Join(errs...)
}

func (r *order) findFirewalls(ctx context.Context, api *hcloud.Client) error {
	if len(r.Firewalls) == 0 {
		return nil
	}
	have, err := api.Firewall.All(ctx)
	if err != nil {
		return explain("list firewalls", err)
	}
	var errs []error
	for _, wanted := range r.Firewalls {
		f, err := pick("firewall", wanted, have, func(f *hcloud.Firewall) (string, int64) { return f.Name, f.ID })
		r.firewalls, errs = append(r.firewalls, f), append(errs, err)
	}
	return errors.Join(errs...)
}

// pick finds what a name, or a number as the API has them, means.
func pick[T any](what, wanted string, have []*T, called func(*T) (string, int64)) (*T, error) {
	for _, t := range have {
		if name, id := called(t); name == wanted || strconv.FormatInt(id, 10) == wanted {
			return t, nil
		}
	}
	return nil, fmt.Errorf("hetzner: there is no %s %s; there are: %s", what, wanted, first(strings.Join(names(have, called), ", "), "none"))
}

func names[T any](have []*T, called func(*T) (string, int64)) []string {
	all := map[string]bool{}
	for _, t := range have {
		name, _ := called(t)
		all[name] = true
	}
	return slices.Sorted(maps.Keys(all))
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// Plan looks everything up that Create would need.
func (h *Hetzner) Plan(ctx context.Context, o provision.Order) (*provision.Plan, error) {
	r, err := h.resolve(ctx, o)
	if err != nil {
		return nil, err
	}
	plan := &provision.Plan{}
	for _, name := range o.Names {
		if s := r.existing[name]; s != nil {
			plan.Existing = append(plan.Existing, h.server(s))
		}
	}
	if len(r.missing) == 0 {
		return plan, nil
	}
	key, err := h.findKey(ctx, o.SSHKey)
	if err != nil {
		return nil, err
	}
	if key == nil {
		plan.Other = append(plan.Other, "SSH key "+o.SSHKey.Name)
	}
	if o.PlacementGroup != "" && r.group == nil {
		plan.Other = append(plan.Other, "placement group "+o.PlacementGroup+" (spread)")
	}
	monthly, currency, err := h.monthly(ctx, r)
	if err != nil {
		return nil, err
	}
	for _, name := range r.missing {
		plan.Missing = append(plan.Missing, provision.PlannedServer{
			Name: name, Type: r.kind.Name, Location: r.location.Name, Image: first(r.image.Name, r.image.Description),
			Monthly: monthly.FloatString(2) + " " + currency,
		})
	}
	total := new(big.Rat).Mul(monthly, big.NewRat(int64(len(r.missing)), 1))
	plan.Monthly = total.FloatString(2) + " " + currency + " a month"
	return plan, nil
}

// monthly is what one server costs with its IPv4 address, value-added tax included.
func (h *Hetzner) monthly(ctx context.Context, r *order) (*big.Rat, string, error) {
	// Not by the client's own method: that one takes as many types of primary addresses as there are of floating ones, and
	// panics where there are more (hcloud-go 2.52).
	request, err := h.api.NewRequest(ctx, http.MethodGet, "/pricing", nil)
	if err != nil {
		return nil, "", explain("prices", err)
	}
	var said schema.PricingGetResponse
	if _, err := h.api.Do(request, &said); err != nil {
		return nil, "", explain("prices", err)
	}
	sum, known := new(big.Rat), false
	for _, t := range said.Pricing.ServerTypes {
		for _, p := range t.Prices {
			if t.ID == r.kind.ID && p.Location == r.location.Name {
				known = true
				err = errors.Join(err, add(sum, p.PriceMonthly.Gross))
			}
		}
	}
	for _, ip := range said.Pricing.PrimaryIPs {
		for _, p := range ip.Prices {
			if ip.Type == string(hcloud.PrimaryIPTypeIPv4) && p.Location == r.location.Name {
				err = errors.Join(err, add(sum, p.PriceMonthly.Gross))
			}
		}
	}
	if !known {
		err = fmt.Errorf("hetzner: prices: it names none for %s at %s", r.kind.Name, r.location.Name)
	}
	return sum, said.Pricing.Currency, err
}

// amountForm keeps out what a big.Rat would take ages for, such as 1e999999999.
var amountForm = regexp.MustCompile(`^[0-9]{1,12}(\.[0-9]{1,30})?$`)

func add(sum *big.Rat, amount string) error {
	if !amountForm.MatchString(amount) {
		return fmt.Errorf("hetzner: prices: %q is no amount", amount)
	}
	price, _ := new(big.Rat).SetString(amount) // what has that form is a number
	sum.Add(sum, price)
	return nil
}
