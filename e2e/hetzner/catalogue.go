package hetzner

import (
	"fmt"
	"slices"
	"time"

	"github.com/hetznercloud/hcloud-go/v2/hcloud/schema"
)

var locations = []schema.Location{
	{ID: 1, Name: "fsn1", Description: "Falkenstein DC Park 1", Country: "DE", City: "Falkenstein", NetworkZone: "eu-central"},
	{ID: 2, Name: "nbg1", Description: "Nuremberg DC Park 1", Country: "DE", City: "Nuremberg", NetworkZone: "eu-central"},
	{ID: 3, Name: "hel1", Description: "Helsinki DC Park 1", Country: "FI", City: "Helsinki", NetworkZone: "eu-central"},
	{ID: 4, Name: "ash", Description: "Ashburn, VA", Country: "US", City: "Ashburn, VA", NetworkZone: "us-east"},
}

// allServerTypes: one that is everywhere, one that is not made at one of its locations any more, one for the other architecture,
// one that is elsewhere, one that is sold out at a location, one that will not be made any more, and one that is not.
var allServerTypes = []schema.ServerType{
	serverType(101, "cpx22", "x86", 2, 4, 80, 599, "fsn1", "nbg1", "hel1"),
	goneAt(serverType(102, "cx23", "x86", 2, 4, 40, 349, "fsn1", "nbg1", "hel1"), "nbg1"),
	serverType(103, "cax11", "arm", 2, 4, 40, 379, "fsn1", "nbg1", "hel1"),
	serverType(104, "cpx11", "x86", 2, 2, 40, 499, "ash"),
	soldOut(serverType(105, "ccx13", "x86", 2, 8, 80, 1249, "fsn1", "nbg1", "hel1", "ash"), "hel1"),
	deprecated(serverType(106, "cpx32", "x86", 4, 8, 160, 1099, "fsn1", "nbg1", "hel1"), future),
	deprecated(serverType(22, "cpx21", "x86", 3, 4, 80, 755, "fsn1", "nbg1", "hel1", "ash"), past),
}

func serverType(id int64, name, architecture string, cores int, memory float32, disk, cents int, at ...string) schema.ServerType {
	t := schema.ServerType{
		ID: id, Name: name, Description: name, Category: "Shared vCPU", Cores: cores, Memory: memory, Disk: disk, StorageType: "local", CPUType: "shared", Architecture: architecture,
	}
	for _, l := range locations {
		if slices.Contains(at, l.Name) {
			t.Locations = append(t.Locations, schema.ServerTypeLocation{ID: l.ID, Name: l.Name, Available: true})
			t.Prices = append(t.Prices, schema.PricingServerTypePrice{Location: l.Name, PriceHourly: price(cents / 600), PriceMonthly: price(cents), IncludedTraffic: 20 << 40, PricePerTBTraffic: price(100)})
		}
	}
	return t
}

func soldOut(t schema.ServerType, at string) schema.ServerType {
	for i := range t.Locations {
		t.Locations[i].Available = t.Locations[i].Name != at
	}
	return t
}

// past and future are when something is made no more.
var past, future = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2126, 1, 1, 0, 0, 0, 0, time.UTC)

func deprecated(t schema.ServerType, from time.Time) schema.ServerType {
	t.Deprecation = &schema.DeprecationInfo{Announced: from.AddDate(0, -3, 0), UnavailableAfter: from}
	return t
}

func goneAt(t schema.ServerType, at string) schema.ServerType {
	for i := range t.Locations {
		if t.Locations[i].Name == at {
			t.Locations[i].Deprecation = &schema.DeprecationInfo{Announced: past.AddDate(0, -3, 0), UnavailableAfter: past}
		}
	}
	return t
}

// unavailable tells whether something is made no more.
func (f *Fake) unavailable(d *schema.DeprecationInfo) bool {
	return d != nil && d.UnavailableAfter.Before(f.now)
}

// serverTypes are those that there are now.
func (f *Fake) serverTypes() []schema.ServerType {
	return slices.DeleteFunc(slices.Clone(allServerTypes), func(t schema.ServerType) bool { return f.unavailable(t.Deprecation) })
}

// price is an amount in cents, with the digits that the API gives and a value-added tax of a quarter.
func price(cents int) schema.Price {
	return schema.Price{Net: fmt.Sprintf("%d.%02d00000000", cents/100, cents%100), Gross: fmt.Sprintf("%d.%04d00000000000000", cents*125/10000, cents*125%10000)}
}

func (f *Fake) pricing() schema.Pricing {
	p := schema.Pricing{Currency: "EUR", VATRate: "25.00"}
	for _, t := range f.serverTypes() {
		p.ServerTypes = append(p.ServerTypes, schema.PricingServerType{ID: t.ID, Name: t.Name, Prices: t.Prices})
	}
	ipv4 := schema.PricingPrimaryIP{Type: "ipv4"}
	ipv6 := schema.PricingPrimaryIP{Type: "ipv6"}
	for _, l := range locations {
		ipv4.Prices = append(ipv4.Prices, schema.PricingPrimaryIPTypePrice{Location: l.Name, PriceHourly: price(0), PriceMonthly: price(52)})
		ipv6.Prices = append(ipv6.Prices, schema.PricingPrimaryIPTypePrice{Location: l.Name, PriceHourly: price(0), PriceMonthly: price(0)})
	}
	p.FloatingIPs = []schema.PricingFloatingIPType{{Type: "ipv4"}, {Type: "ipv6"}}
	p.PrimaryIPs = []schema.PricingPrimaryIP{ipv4, ipv6}
	return p
}

var images = []schema.Image{
	image(201, "ubuntu-24.04", "ubuntu", "24.04", "x86"), image(202, "ubuntu-24.04", "ubuntu", "24.04", "arm"),
	image(203, "debian-13", "debian", "13", "x86"), image(204, "debian-13", "debian", "13", "arm"),
	image(205, "rocky-9", "rocky", "9", "x86"),
}

func image(id int64, name, flavour, version, architecture string) schema.Image {
	return schema.Image{ID: id, Status: "available", Type: "system", Name: &name, Description: name, DiskSize: 5, OSFlavor: flavour, OSVersion: &version, Architecture: architecture, RapidDeploy: true, Labels: map[string]string{}}
}

func imagesFor(architecture string) []schema.Image {
	return slices.DeleteFunc(slices.Clone(images), func(i schema.Image) bool { return i.Architecture != architecture })
}
