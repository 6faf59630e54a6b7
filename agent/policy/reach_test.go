package policy

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

var people = []protocol.Role{protocol.Viewer, protocol.Operator, protocol.Deployer, protocol.Admin}

func TestReach(t *testing.T) {
	own := func() ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fe80::5%eth0"), netip.MustParseAddr("2001:db8::5")}, nil
	}
	p := parse(t, `{"v":1,"tunnels":[{"address":"10.0.0.7:5432"},{"address":"db.internal:*","role":"admin"},{"address":"db.internal:5432","role":"deployer"},
		{"address":"127.0.0.1:8080"},{"address":"[2001:db8::7]:443","role":"operator"}]}`)
	for _, c := range []struct {
		to    string
		least protocol.Role // "": nobody
		dial  string        // "": to
	}{
		{"127.0.0.1:22", protocol.Operator, ""},
		{"[::1]:22", protocol.Operator, ""},
		{"localhost:22", protocol.Operator, "127.0.0.1:22"},
		{"127.0.0.1:0022", protocol.Operator, "127.0.0.1:22"},
		{"[::ffff:127.0.0.1]:22", protocol.Operator, "127.0.0.1:22"},
		{"127.0.0.1:2379", protocol.Deployer, ""},
		{"127.9.9.9:80", protocol.Deployer, ""},
		{"[::1]:80", protocol.Deployer, ""},
		{"127.0.0.1:8080", protocol.Operator, ""},
		{"localhost:8080", protocol.Operator, "127.0.0.1:8080"},
		{"[::1]:8080", protocol.Deployer, ""},
		{"10.0.0.5:22", protocol.Deployer, ""},
		{"10.0.0.5:443", protocol.Deployer, ""},
		{"[::ffff:10.0.0.5]:443", protocol.Deployer, "10.0.0.5:443"},
		{"[fe80::5%eth0]:443", protocol.Deployer, ""},
		{"[2001:db8::5]:443", protocol.Deployer, ""},
		{"10.0.0.6:22", "", ""},
		{"0.0.0.0:22", "", ""},
		{"[::]:22", "", ""},
		{"169.254.169.254:80", "", ""},
		{"example.org:443", "", ""},
		{"10.0.0.7:5432", protocol.Operator, ""},
		{"[::ffff:10.0.0.7]:5432", protocol.Operator, "10.0.0.7:5432"},
		{"10.0.0.7:5433", "", ""},
		{"10.0.0.70:5432", "", ""},
		{"[2001:db8::7]:443", protocol.Operator, ""},
		{"[2001:db8:0::7]:443", protocol.Operator, "[2001:db8::7]:443"},
		{"db.internal:5432", protocol.Deployer, ""},
		{"db.internal:1", protocol.Admin, ""},
		{"db.internal.evil:5432", "", ""},
		{"xdb.internal:5432", "", ""},
	} {
		for _, role := range people {
			dial, name, err := p.Reach(c.to, role, own)
			may := c.least != "" && role.AtLeast(c.least)
			if (err == nil) != may {
				t.Errorf("%s, %s: %v", c.to, role, err)
				continue
			}
			if err == nil {
				if want := c.dial; dial != want && (want != "" || dial != c.to) || name == "" {
					t.Errorf("%s, %s: dials %s, by %q", c.to, role, dial, name)
				}
				continue
			}
			code := protocol.OverRole
			if c.least == "" {
				code = protocol.Denied
			}
			if !errors.Is(err, &protocol.Refusal{Code: code}) || code == protocol.OverRole && !strings.Contains(err.Error(), "needs the role "+string(c.least)) {
				t.Errorf("%s, %s: %v", c.to, role, err)
			}
		}
	}
	for _, to := range []string{"", "22", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:*", "A:1", "a b:1"} {
		if _, _, err := p.Reach(to, protocol.Admin, own); !errors.Is(err, &protocol.Refusal{Code: protocol.Invalid}) {
			t.Errorf("%q: %v", to, err)
		}
	}
	broken := errors.New("no addresses")
	if _, _, err := p.Reach("10.0.0.5:22", protocol.Admin, func() ([]netip.Addr, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Error(err)
	}
}

func TestUploadRoot(t *testing.T) {
	p := parse(t, `{"v":1,"uploads":{"roots":[{"path":"/srv/www"},{"path":"/srv/www/private","role":"admin"},{"path":"/root/uploads","role":"deployer"}]}}`)
	for _, c := range []struct {
		policy Policy
		to     string
		root   string // "": none
		least  protocol.Role
	}{
		{Policy{}, "/root/uploads", DefaultUploads, protocol.Operator},
		{Policy{}, "/root/uploads/a/b", DefaultUploads, protocol.Operator},
		{Policy{}, "/root/uploadsx", "", ""},
		{Policy{}, "/root", "", ""},
		{Policy{}, "/srv/www", "", ""},
		{p, "/root/uploads/a", DefaultUploads, protocol.Deployer},
		{p, "/srv/www/a", "/srv/www", protocol.Operator},
		{p, "/srv/www/private", "/srv/www/private", protocol.Admin},
		{p, "/srv/www/private/a", "/srv/www/private", protocol.Admin},
		{p, "/srv/www/privates", "/srv/www", protocol.Operator},
		{p, "/srv", "", ""},
	} {
		for _, role := range people {
			root, err := c.policy.UploadRoot(c.to, role)
			switch {
			case c.root == "":
				if !errors.Is(err, &protocol.Refusal{Code: protocol.Denied}) || !strings.Contains(err.Error(), DefaultUploads) {
					t.Errorf("%s, %s: %q, %v", c.to, role, root, err)
				}
			case !role.AtLeast(c.least):
				if !errors.Is(err, &protocol.Refusal{Code: protocol.OverRole}) {
					t.Errorf("%s, %s: %q, %v", c.to, role, root, err)
				}
			case err != nil || root != c.root:
				t.Errorf("%s, %s: %q, %v", c.to, role, root, err)
			}
		}
	}
	for _, to := range []string{"", "/", "uploads", "/root/uploads/", "/root/uploads/../x", "/root/uploads/./x", "/root/uploads//x", "/root/uploads/a\n"} {
		if _, err := p.UploadRoot(to, protocol.Admin); !errors.Is(err, &protocol.Refusal{Code: protocol.Invalid}) {
			t.Errorf("%q: %v", to, err)
		}
	}
}
