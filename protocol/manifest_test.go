package protocol

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func manifest(change func(*Manifest)) *Manifest {
	d := Digest([]byte("x"))
	m := &Manifest{Version: Version, Node: "n1", Serial: 3, Deployment: "20261123-120000-abcd", Created: now, Mode: Switch,
		Files: []File{{Path: "configuration.nix", SHA256: d, Size: 1}, {Path: "flake.nix", SHA256: d, Size: 1}, {Path: "modules/default.nix", SHA256: d, Size: 1}},
		Attr:  SystemAttr("n1"), Timeout: 300, BuildTimeout: 7200, Settle: 5}
	change(m)
	return m
}

func TestManifestValidate(t *testing.T) {
	if err := manifest(func(*Manifest) {}).Validate(); err != nil {
		t.Fatal(err)
	}
	path := func(p string) func(*Manifest) {
		return func(m *Manifest) { m.Files = []File{{Path: p, SHA256: Digest(nil)}} }
	}
	for name, change := range map[string]func(*Manifest){
		"version":          func(m *Manifest) { m.Version = 2 },
		"node":             func(m *Manifest) { m.Node = "../n1" },
		"no serial":        func(m *Manifest) { m.Serial = 0 },
		"dry with serial":  func(m *Manifest) { m.Mode = DryActivate },
		"mode":             func(m *Manifest) { m.Mode = "explode" },
		"deployment":       func(m *Manifest) { m.Deployment = "a.b" },
		"attribute":        func(m *Manifest) { m.Attr = SystemAttr("n2") },
		"no timeout":       func(m *Manifest) { m.Timeout = 0 },
		"settle":           func(m *Manifest) { m.Settle = 300 },
		"no files":         func(m *Manifest) { m.Files = nil },
		"order":            func(m *Manifest) { m.Files[0], m.Files[1] = m.Files[1], m.Files[0] },
		"twice":            func(m *Manifest) { m.Files[1] = m.Files[0] },
		"digest":           func(m *Manifest) { m.Files[0].SHA256 = "../../etc/passwd" },
		"negative size":    func(m *Manifest) { m.Files[0].Size = -1 },
		"large":            func(m *Manifest) { m.Files[0].Size = MaxFileSize + 1 },
		"file and folder":  func(m *Manifest) { m.Files[1].Path = "configuration.nix/x" },
		"absolute":         path("/etc/passwd"),
		"up":               path("../x"),
		"up inside":        path("a/../../x"),
		"dot":              path("."),
		"trailing slash":   path("a/"),
		"double slash":     path("a//b"),
		"nul":              path("a\x00b"),
		"git":              path(".git/config"),
		"git inside":       path("modules/.git/hooks/x"),
		"the node's own":   path("hardware-configuration.nix"),
		"the node's net":   path("networking.nix"),
		"the node's facts": path("nix-infra/facts.json"),
	} {
		if manifest(change).Validate() == nil {
			t.Errorf("%s: valid", name)
		}
	}
	if err := manifest(path("modules/networking.nix")).Validate(); err != nil {
		t.Errorf("a module of that name: %v", err)
	}
}

// A digest that is right for neither time nor options must not change what "nothing changed" means.
func TestTreeIgnoresWhatIsNotBuilt(t *testing.T) {
	a := manifest(func(*Manifest) {})
	b := manifest(func(m *Manifest) {
		m.Serial, m.Created, m.Deployment, m.Timeout, m.Mode = 9, now.Add(time.Hour), "other", 10, Test
	})
	c := manifest(func(m *Manifest) { m.Files[0].SHA256 = Digest([]byte("y")) })
	d := manifest(func(m *Manifest) { m.Files[0].Exec = true })
	if a.Tree() != b.Tree() || a.Tree() == c.Tree() || a.Tree() == d.Tree() {
		t.Error("Tree does not tell what is built")
	}
}

func TestVerifyManifest(t *testing.T) {
	f := newFleet(t)
	deployer := f.signer(t, "dora", Deployer, time.Time{})
	operator := f.signer(t, "otto", Operator, time.Time{})
	doc, err := deployer.Manifest(manifest(func(*Manifest) {}))
	must(t, err)
	m, who, err := f.verifier.Manifest(doc, "n1", now.Add(30*24*time.Hour)) // a node that was off for a month
	must(t, err)
	if m.Serial != 3 || who.Name != "dora" {
		t.Fatalf("%+v by %+v", m, who)
	}
	over, err := operator.Manifest(manifest(func(*Manifest) {}))
	must(t, err)
	dry, err := deployer.Manifest(manifest(func(m *Manifest) { m.Mode, m.Serial = DryActivate, 0 }))
	must(t, err)
	request, _, err := deployer.Request(Deploy, "n1", manifest(func(*Manifest) {}), now)
	must(t, err)
	// A signature over one deployment's id, with a manifest of another inside.
	mixed, err := deployer.Sign(Header{Version: Version, Kind: KindManifest, ID: "another", Action: Deploy, Target: "n1"}, Encode(manifest(func(*Manifest) {})))
	must(t, err)
	elsewhere, err := deployer.Sign(Header{Version: Version, Kind: KindManifest, ID: "20261123-120000-abcd", Action: Deploy, Target: "n1"},
		Encode(manifest(func(m *Manifest) { m.Node = "n2"; m.Attr = SystemAttr("n2") })))
	must(t, err)
	for name, c := range map[string]struct {
		doc  []byte
		node string
		when time.Time
		want Code
	}{
		"another node's":       {doc, "n2", now, Misaddressed},
		"over role":            {over, "n1", now, OverRole},
		"changed":              {[]byte(strings.Replace(string(doc), `"body":"e`, `"body":"f`, 1)), "n1", now, Tampered},
		"cut":                  {doc[:len(doc)-5], "n1", now, Malformed},
		"dry run of yesterday": {dry, "n1", now.Add(24 * time.Hour), Expired},
		"a request":            {Encode(request), "n1", now, Malformed},
		"another deployment":   {Encode(mixed), "n1", now, Misaddressed},
		"another node inside":  {Encode(elsewhere), "n1", now, Misaddressed},
	} {
		if _, _, err := f.verifier.Manifest(c.doc, c.node, c.when); !errors.Is(err, &Refusal{Code: c.want}) {
			t.Errorf("%s: got %v, want %s", name, err, c.want)
		}
	}
}
