package command

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/bundle"
)

// readBundle reads a bundle as a node would.
func readBundle(t *testing.T, f *fleettest.Fleet, file, node string) (*protocol.Manifest, map[string]string) {
	t.Helper()
	v, err := protocol.NewVerifier(f.Authority.Public.Operator, f.Authority.Public.AccountJWT)
	if err != nil {
		t.Fatal(err)
	}
	r, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	d, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var m *protocol.Manifest
	blobs := map[string]string{}
	err = bundle.Read(r, func(doc []byte) ([]string, error) {
		if m, _, err = v.Manifest(doc, node, time.Now()); err != nil {
			return nil, err
		}
		return m.Blobs(), nil
	}, func(digest string, packed []byte) error {
		data, err := d.DecodeAll(packed, nil)
		if err == nil && protocol.Digest(data) != digest {
			t.Errorf("blob %s has another content", digest)
		}
		blobs[digest] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, file := range m.Files {
		files[file.Path] = blobs[file.SHA256]
	}
	return m, files
}

func TestDeployToFile(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1", "web")
	f.Add("web2", "web")
	f.Change("web1", func(n *protocol.NodeState) { n.Serial = 7 })
	f.Requests()
	file := s.path("web1.bundle")
	out := s.must("deploy", "web1", "--out", file)
	if !strings.Contains(out, "serial 8") || !strings.Contains(out, "nix-infra-agent apply "+file) {
		t.Errorf("it says\n%s", out)
	}
	m, files := readBundle(t, f, file, "web1")
	if m.Serial != 8 || m.Mode != protocol.Switch || files["flake.nix"] != s.read("flake.nix") || files["web1.nix"] != s.read("nodes/web1.nix") {
		t.Errorf("%+v\n%v", m, files)
	}
	if requests := f.Requests(); !slices.Equal(requests, []protocol.Action{protocol.ListNodes}) {
		t.Errorf("the controller was asked for %v", requests)
	}
	docs := documents(t, s.must("deploy", "web1", "--out", file, "--json"))
	if len(docs) != 1 || docs[0]["event"] != "bundle" || docs[0]["serial"] != 8.0 || docs[0]["file"] != file || docs[0]["bytes"].(float64) < 100 {
		t.Errorf("documents: %v", docs)
	}
	s.expect(Refused, "--out writes a file for one node, and the targets name 2", "deploy", "@web", "--out", file)
	s.expect(Refused, "a dry-activate can't be written into a file", "deploy", "web1", "--out", file, "--mode", "dry-activate")
	s.expect(Refused, "there is no rollout", "deploy", "web1", "--out", file, "--canary", "1")
	s.expect(Refused, "--offline and --serial go with --out", "deploy", "web1", "--offline")
	s.expect(Refused, "--offline needs --serial N", "deploy", "web1", "--out", file, "--offline")
	s.expect(Refused, "--serial goes with --offline", "deploy", "web1", "--out", file, "--serial", "3")
	s.expect(Refused, "can't write the deployment into", "deploy", "web1", "--out", s.path("nowhere", "x"))

	// With the controller down.
	f.Stop()
	s.expect(Refused, "without a controller, add --offline --serial N", "deploy", "web1", "--out", file)
	s.must("deploy", "web1", "--out", file, "--offline", "--serial", "12")
	if m, files = readBundle(t, f, file, "web1"); m.Serial != 12 || files["web1.nix"] != s.read("nodes/web1.nix") {
		t.Errorf("%+v\n%v", m, files)
	}
	s.expect(Refused, "--offline takes the name of one node", "deploy", "@web", "--out", file, "--offline", "--serial", "12")
	s.expect(Refused, "--offline takes the name of one node", "deploy", "web1", "web2", "--out", file, "--offline", "--serial", "12")
	s.expect(Refused, "--build=local asks the node for the files that belong to it", "deploy", "web1", "--out", file, "--offline", "--serial", "12", "--build=local", "--cache-push", "https://cache.example.org")

	// What only the controller knows can't be filled in.
	s.write("nodes/web1.nix", "[%%localhost.ipv4%%] [%%web2.ipv4%%]\n")
	s.expect(Refused, "nodes/web1.nix:1: placeholder [%%localhost.ipv4%%]: the IPv4 address of web1 is not known; set nodes.web1.ipv4 in nix-infra.yaml", "deploy", "web1", "--out", file, "--offline", "--serial", "12")
	s.write("nix-infra.yaml", s.read("nix-infra.yaml")+"nodes: { web1: { ipv4: 192.0.2.1 }, web2: { ipv4: 192.0.2.2 } }\n")
	s.must("deploy", "web1", "--out", file, "--offline", "--serial", "12")
	if _, files = readBundle(t, f, file, "web1"); files["web1.nix"] != "192.0.2.1 192.0.2.2\n" {
		t.Errorf("%v", files)
	}
}
