package project

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// The values that placeholders are filled in with. Each is checked for what would break out of a Nix
// string; a value that is not there is an error that says where it comes from.

func (c *composer) nodeName() (string, error) { return c.Node, nil }

func (c *composer) hwArch() (string, error) { return c.Arch, nil }

func (c *composer) nixVersion() (string, error) {
	if c.NixOSVersion == "" {
		return "", fmt.Errorf("no NixOS version is known; set defaults.nixos_version in %s, or give --nixos-version", SettingsFile)
	}
	return c.NixOSVersion, nil
}

func (c *composer) sshKey() (string, error) {
	name := "ssh/" + c.SSHKey + ".pub"
	f, err := c.source.read(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%s is missing; put the public key there that may log in to the nodes", name)
	} else if err != nil {
		return "", err
	}
	key := strings.TrimSpace(string(f.Data))
	if key == "" {
		return "", fmt.Errorf("%s is empty; put the public key there that may log in to the nodes", name)
	}
	if err := nixString(key); err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	return key, nil
}

func (c *composer) etcdCluster() (string, error) {
	if len(c.ControlNodes) == 0 {
		return "", errors.New("no control nodes are known; nix-infra init-ctrl records them, or name them in CTRL_NODES")
	}
	var members []string
	for _, n := range c.ControlNodes {
		if err := ValidNodeName(n.Name); err != nil {
			return "", err
		}
		ip, err := c.ipv4(n.Name)
		if err != nil {
			return "", err
		}
		members = append(members, fmt.Sprintf(`{ name = "%s"; ip = "%s"; }`, n.Name, ip))
	}
	return strings.Join(members, " "), nil
}

func (c *composer) etcdClusterToken() (string, error) {
	if c.ClusterUUID == "" {
		return "", errors.New("no cluster id is known; nix-infra init-ctrl records it, or update-ctrl for a cluster that runs already (--cluster-uuid)")
	}
	return c.ClusterUUID, nixString(c.ClusterUUID)
}

// lookup gathers what is known of a node, and tells whether there is one of that name. What the owner
// wrote down counts more than what the request says.
func (c *composer) lookup(name string) (NodeFacts, bool) {
	all := NodeFacts{Name: name}
	known := name == c.Node
	for _, list := range [][]NodeFacts{c.ControlNodes, c.Nodes} {
		for _, f := range list {
			if f.Name == name {
				known = true
				all.IPv4, all.OverlayIP, all.Arch = firstOf(f.IPv4, all.IPv4), firstOf(f.OverlayIP, all.OverlayIP), firstOf(f.Arch, all.Arch)
			}
		}
	}
	for _, s := range c.servers {
		if s.Name == name {
			known = true
			if validIPv4(s.IP) == nil { // else a host name or an IPv6 address: good for SSH only
				all.IPv4 = firstOf(s.IP, all.IPv4)
			}
		}
	}
	if n, ok := c.project.Settings.Nodes[name]; ok {
		known = true
		all.IPv4, all.OverlayIP = firstOf(n.IPv4, all.IPv4), firstOf(n.OverlayIP, all.OverlayIP)
	}
	return all, known
}

func (c *composer) known(name string) bool {
	_, ok := c.lookup(name)
	return ok
}

func (c *composer) nodeNames() []string {
	names := slices.Collect(maps.Keys(c.project.Settings.Nodes))
	names = append(names, c.Node)
	for _, f := range slices.Concat(c.ControlNodes, c.Nodes) {
		names = append(names, f.Name)
	}
	for _, s := range c.servers {
		names = append(names, s.Name)
	}
	return sortedSet(names)
}

func (c *composer) ipv4(node string) (string, error) {
	about, _ := c.lookup(node)
	if about.IPv4 == "" {
		return "", fmt.Errorf("the IPv4 address of %s is not known; set nodes.%s.ipv4 in %s", show(node), show(node), SettingsFile)
	}
	return about.IPv4, validIPv4(about.IPv4)
}

func (c *composer) overlayIP(node string) (string, error) {
	about, _ := c.lookup(node)
	if about.OverlayIP == "" {
		return "", fmt.Errorf("the overlay address of %s is not known: its agent tells it once the node is in the overlay network of its cluster; until then, leave out what needs it, or set nodes.%s.overlay_ip in %s",
			show(node), show(node), SettingsFile)
	}
	return about.OverlayIP, validIPv4(about.OverlayIP)
}

// TrustedKeysPrefix is how the names of secrets begin that are public keys of binary caches.
const TrustedKeysPrefix = "nix-store.trusted-public-keys"

// trustedForm is a public key as nix prints it: name:base64.
var trustedForm = regexp.MustCompile(`^[A-Za-z0-9._-]+:[A-Za-z0-9+/]+=*$`)

func (c *composer) trustedKeys() (string, error) {
	var keys []string
	if c.TrustedKeys != nil {
		var err error
		if keys, err = c.TrustedKeys(); err != nil {
			return "", err
		}
	} else if found, _ := filepath.Glob(filepath.Join(c.source.root, "secrets", TrustedKeysPrefix+"*")); len(found) > 0 {
		return "", fmt.Errorf("secrets/%s is encrypted, and this command does not read secrets", show(filepath.Base(found[0])))
	}
	var list strings.Builder
	list.WriteString("[ ")
	for _, key := range keys {
		key = strings.TrimSpace(key)
		if !trustedForm.MatchString(key) {
			return "", fmt.Errorf("%s is no public key of a binary cache; expected such as cache.example.org-1:AbC…=", show(key))
		}
		list.WriteString(`"` + key + `" `)
	}
	list.WriteString("]")
	return list.String(), nil
}
