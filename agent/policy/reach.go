package policy

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/nix-infra/nix-infra/protocol"
)

const maxTunnels = 128

// Tunnel allows tunnels to an address.
type Tunnel struct {
	Address string        `json:"address"` // host:port as protocol.CheckAddress takes it, or host:* for all ports
	Role    protocol.Role `json:"role"`    // the least that is needed
}

// Root is a folder that takes uploads.
type Root struct {
	Path string        `json:"path"`
	Role protocol.Role `json:"role"` // the least that is needed
}

// DefaultUploads is the folder that every node takes uploads in, from operators, unless its policy gives it to another role.
const DefaultUploads = "/root/uploads"

// sshPort is where operators get through without a rule: sshd asks who they are itself.
const sshPort = 22

// Reach tells which address a tunnel to an address (host:port, as protocol.CheckAddress takes it) is to dial, and the
// name of what allows it to somebody of a role; "localhost" becomes 127.0.0.1. own returns the node's own addresses.
//
// Without a rule, an operator reaches the node's sshd, and a deployer all that listens on the node: a deployer could
// put the rule into the policy by a deployment anyway. Errors are a *protocol.Refusal, or own's.
func (p Policy) Reach(to string, role protocol.Role, own func() ([]netip.Addr, error)) (dial, name string, err error) {
	if err := protocol.CheckAddress(to); err != nil {
		return "", "", protocol.Refuse(protocol.Invalid, "%v", err)
	}
	host, port := splitAddress(to)
	if host == "localhost" {
		host = "127.0.0.1"
	}
	dial = net.JoinHostPort(host, port)
	var least protocol.Role // of the rules that name the address
	allows := func(needed protocol.Role) bool {
		if role.AtLeast(needed) {
			return true
		}
		if least == "" || least.AtLeast(needed) {
			least = needed
		}
		return false
	}
	for _, t := range p.Tunnels {
		if ruleHost, rulePort := splitAddress(t.Address); ruleHost == host && (rulePort == "*" || rulePort == port) && allows(t.Role) {
			return dial, "tunnels: " + t.Address, nil
		}
	}
	addr, _ := netip.ParseAddr(host)
	if addr.IsLoopback() && port == strconv.Itoa(sshPort) && allows(protocol.Operator) {
		return dial, "default: the node's sshd", nil
	}
	if addr.IsLoopback() && allows(protocol.Deployer) {
		return dial, "default: loopback", nil
	}
	if addr.IsValid() && !addr.IsLoopback() {
		addresses, err := own()
		if err != nil {
			return "", "", fmt.Errorf("the node's own addresses can't be read: %w", err)
		}
		for _, a := range addresses {
			if a.Unmap().WithZone("") == addr.WithZone("") && allows(protocol.Deployer) {
				return dial, "default: an address of the node", nil
			}
		}
	}
	if least != "" {
		return "", "", protocol.Refuse(protocol.OverRole, "a tunnel to %s needs the role %s, you are %s", to, least, role)
	}
	return "", "", protocol.Refuse(protocol.Denied, "the node's policy has no tunnel to %s: it is no address of the node's own, "+
		"and no rule of \"tunnels\" names it (docs/policy.md)", to)
}

// splitAddress returns host and port in the one form in which they are compared: IPv4 where it is IPv4 in IPv6, and a
// port without leading zeros.
func splitAddress(s string) (host, port string) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "", ""
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		host = addr.Unmap().String()
	}
	if n, err := strconv.ParseUint(port, 10, 16); err == nil {
		port = strconv.FormatUint(n, 10)
	}
	return host, port
}

// UploadRoot tells which root the folder or file of an upload is in, or at: the deepest one decides. Errors are a
// *protocol.Refusal.
func (p Policy) UploadRoot(to string, role protocol.Role) (root string, err error) {
	if !isFolder(to) {
		return "", protocol.Refuse(protocol.Invalid, "%.200q is no absolute path below / without . and .. in it", to)
	}
	roots := append(p.Uploads[:len(p.Uploads):len(p.Uploads)], Root{DefaultUploads, protocol.Operator})
	var in *Root
	for i, r := range roots {
		if (to == r.Path || strings.HasPrefix(to, r.Path+"/")) && (in == nil || len(r.Path) > len(in.Path)) {
			in = &roots[i]
		}
	}
	if in == nil {
		paths := make([]string, len(roots))
		for i, r := range roots {
			paths[i] = r.Path
		}
		return "", protocol.Refuse(protocol.Denied, "the node's policy takes no uploads at %s: it does in %s; \"uploads.roots\" names more (docs/policy.md)",
			to, strings.Join(paths, ", "))
	}
	if !role.AtLeast(in.Role) {
		return "", protocol.Refuse(protocol.OverRole, "an upload into %s needs the role %s, you are %s", in.Path, in.Role, role)
	}
	return in.Path, nil
}

func (p Policy) checkTunnels() error {
	if n := len(p.Tunnels); n > maxTunnels {
		return fmt.Errorf("field \"tunnels\": %d rules; %d are possible", n, maxTunnels)
	}
	for i := range p.Tunnels {
		t := &p.Tunnels[i]
		address := t.Address
		if host, all := strings.CutSuffix(address, ":*"); all {
			address = host + ":1"
		}
		if err := protocol.CheckAddress(address); err != nil {
			return fmt.Errorf("field \"tunnels\": rule %d: address %.80q: expected host:port or host:*, the host an IP address or a name in lower case", i+1, t.Address)
		}
		if err := checkRole(&t.Role); err != nil {
			return fmt.Errorf("field \"tunnels\": rule %d: %w", i+1, err)
		}
	}
	return nil
}

func (p Policy) checkUploads() error {
	if n := len(p.Uploads); n > maxRoots {
		return fmt.Errorf("field \"uploads.roots\": %d roots; %d are possible", n, maxRoots)
	}
	for i := range p.Uploads {
		r := &p.Uploads[i]
		if !isFolder(r.Path) {
			return fmt.Errorf("field \"uploads.roots\": %.80q is no absolute path of a folder below / without . and .. in it", r.Path)
		}
		for _, never := range []string{"/nix", "/proc", "/sys", "/dev", "/boot"} {
			if r.Path == never || strings.HasPrefix(r.Path, never+"/") {
				return fmt.Errorf("field \"uploads.roots\": %s: what is below %s is the system's own", r.Path, never)
			}
		}
		if err := checkRole(&r.Role); err != nil {
			return fmt.Errorf("field \"uploads.roots\": %s: %w", r.Path, err)
		}
	}
	return nil
}

// checkRole makes operator of "", and wants that or more: who may only ask has no tunnel and no upload.
func checkRole(r *protocol.Role) error {
	if *r == "" {
		*r = protocol.Operator
	}
	if !r.AtLeast(protocol.Operator) {
		return fmt.Errorf("role %.80q: expected operator, deployer or admin", *r)
	}
	return nil
}
