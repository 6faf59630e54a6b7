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

// serverTypes: one that is everywhere, one that is not, one for the other architecture, one that is sold out at a
// location, and one that is not made any more.
var serverTypes = []schema.ServerType{
	serverType(101, "cpx22", "x86", 2, 4, 80, 599, "fsn1", "nbg1", "hel1"),
	serverType(102, "cx23", "x86", 2, 4, 40, 349, "fsn1", "nbg1", "hel1"),
	serverType(103, "cax11", "arm", 2, 4, 40, 379, "fsn1", "nbg1", "hel1"),
	serverType(104, "cpx11", "x86", 2, 2, 40, 499, "ash"),
	soldOut(serverType(105, "ccx13", "x86", 2, 8, 80, 1249, "fsn1", "nbg1", "hel1", "ash"), "hel1"),
	gone(serverType(22, "cpx21", "x86", 3, 4, 80, 755, "fsn1", "nbg1", "hel1", "ash")),
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

func gone(t schema.ServerType) schema.ServerType {
	announced := time.Date(2025, 10, 1, 0, 0, 0, 0, time.UTC)
	t.Deprecation = &schema.DeprecationInfo{Announced: announced, UnavailableAfter: announced.AddDate(0, 3, 0)}
	return t
}

// price is an amount in cents, with the digits that the API gives and a value-added tax of a quarter.
func price(cents int) schema.Price {
	return schema.Price{Net: fmt.Sprintf("%d.%02d00000000", cents/100, cents%100), Gross: fmt.Sprintf("%d.%04d00000000000000", cents*125/10000, cents*125%10000)}
}

func pricing() schema.Pricing {
	p := schema.Pricing{Currency: "EUR", VATRate: "25.00"}
	for _, t := range serverTypes {
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
