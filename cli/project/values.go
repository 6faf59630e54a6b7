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
		return "", errors.New("no control nodes are given; name them in CTRL_NODES or with --ctrl-nodes")
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
		return "", errors.New("no cluster id is given; give --cluster-uuid")
	}
	return c.ClusterUUID, nixString(c.ClusterUUID)
}

func (c *composer) known(node string) bool {
	_, ok := c.facts[node]
	return ok
}

func (c *composer) nodeNames() []string { return slices.Sorted(maps.Keys(c.facts)) }

func (c *composer) ipv4(node string) (string, error) {
	ip := c.facts[node].IPv4
	if ip == "" {
		return "", fmt.Errorf("the IPv4 address of %s is not known; set nodes.%s.ipv4 in %s", show(node), show(node), SettingsFile)
	}
	return ip, validIPv4(ip)
}

func (c *composer) overlayIP(node string) (string, error) {
	ip := c.facts[node].OverlayIP
	if ip == "" {
		return "", fmt.Errorf("the overlay address of %s is not known; it has one once it runs in the overlay of a cluster", show(node))
	}
	return ip, validIPv4(ip)
}

const trustedPrefix = "nix-store.trusted-public-keys"

// trustedForm is a public key as nix prints it: name:base64.
var trustedForm = regexp.MustCompile(`^[A-Za-z0-9._-]+:[A-Za-z0-9+/]+=*$`)

func (c *composer) trustedKeys() (string, error) {
	var keys []string
	if c.TrustedKeys != nil {
		var err error
		if keys, err = c.TrustedKeys(); err != nil {
			return "", err
		}
	} else if found, _ := filepath.Glob(filepath.Join(c.source.root, "secrets", trustedPrefix+"*")); len(found) > 0 {
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
