package project

import (
	"reflect"
	"strings"
	"testing"
)

func TestProvisionSettings(t *testing.T) {
	s, err := parseSettings([]byte(`
fleet: home
defaults: { close_ssh: true }
provision:
  provider: hetzner
  location: hel1
  machine_type: cpx22
  image: debian-12
  placement_group: spread
  networks: [internal]
  firewalls: [web, "12"]
  labels: { team: ops, example.org/cost-centre: "" }
  method: none
  infect: { commit: 0123456789012345678901234567890123456789, sha256: ` + strings.Repeat("ab", 32) + ` }
  jump: me@gate.example.org:2222,10.0.0.1
nodes:
  web1: { close_ssh: false, ssh: admin@web1.example.org:2222 }
`))
	if err != nil {
		t.Fatal(err)
	}
	want := Provision{
		Provider: "hetzner", Location: "hel1", MachineType: "cpx22", Image: "debian-12", PlacementGroup: "spread",
		Networks: []string{"internal"}, Firewalls: []string{"web", "12"}, Labels: map[string]string{"team": "ops", "example.org/cost-centre": ""},
		Method: MethodNone, Infect: Infect{"0123456789012345678901234567890123456789", strings.Repeat("ab", 32)}, Jump: "me@gate.example.org:2222,10.0.0.1",
	}
	if !reflect.DeepEqual(s.Provision, want) {
		t.Errorf("got  %+v\nwant %+v", s.Provision, want)
	}
	if *s.Node("web1").CloseSSH || !*s.Node("web2").CloseSSH {
		t.Error("a node's close_ssh does not count more than the default")
	}
	if s.Provision.Infect.Pinned() != want.Infect || (Infect{}).Pinned() != DefaultInfect {
		t.Error("another script is pinned than the settings say")
	}
}

func TestProvisionMistakes(t *testing.T) {
	for text, want := range map[string][]string{
		"provider: aws":                                       {`:3: provision.provider: "aws" is not known; use hetzner or self-hosted`},
		"location: he l1\n  image: -x":                        {":3: provision.location", ":4: provision.image"},
		"networks: [a, 'b c']":                                {":3: provision.networks.1"},
		"labels:\n    nix-infra/fleet: a":                     {":4: provision.labels.nix-infra/fleet: label \"nix-infra/fleet\": what begins with nix-infra/ is set by nix-infra itself"},
		"labels: { a b: c }":                                  {":3: provision.labels"},
		"labels: { a: ./ }":                                   {":3: provision.labels.a"},
		"method: kexec":                                       {":3: provision.method: \"kexec\" is not known; use infect, nixos-anywhere or none"},
		"infect: { commit: master }":                          {":3: provision.infect.commit: \"master\" is no commit"},
		"infect: { sha256: 12 }":                              {":3: provision.infect.sha256"},
		"jump: a,b:0":                                         {`:3: provision.jump: "b:0": port "0"`},
		"jump: a,,b":                                          {":3: provision.jump"},
		"jump: a,b,c,d,e,f,g,h,i":                             {":3: provision.jump: 9 hosts"},
		"method: none\nnodes: {n: {ssh: '@h'}}":               {`:4: nodes.n.ssh: "@h": expected [user@]host[:port]`},
		"infect: { commit: " + strings.Repeat("1", 40) + " }": {":3: provision.infect.commit: sha256 is missing beside it"},
	} {
		_, err := parseSettings([]byte("fleet: f\nprovision:\n  " + text))
		failsWith(t, err, want...)
	}
}

func TestParseSSHAddress(t *testing.T) {
	for in, want := range map[string]SSHAddress{
		"host": {Host: "host"}, "admin@host": {User: "admin", Host: "host"}, "admin@host:2222": {"admin", "host", 2222},
		"[2001:db8::1]:23": {Host: "2001:db8::1", Port: 23}, "2001:db8::1": {Host: "2001:db8::1"}, "me@[2001:db8::1]": {User: "me", Host: "2001:db8::1"},
		"": {}, "@host": {}, "user@": {}, "host:0": {}, "host:ssh": {}, "host:65536": {}, "-oProxy=x": {}, "-l@host": {}, "a b": {}, "a\nb": {}, "me@host/x": {},
	} {
		got, err := ParseSSHAddress(in)
		if got != want || (err == nil) != (want.Host != "") {
			t.Errorf("%q: %+v, %v; want %+v", in, got, err, want)
		}
	}
}
