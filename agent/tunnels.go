package agent

import (
	"net"
	"net/netip"

	"github.com/nix-infra/nix-infra/agent/heartbeat"
	"github.com/nix-infra/nix-infra/agent/policy"
	"github.com/nix-infra/nix-infra/agent/tunnel"
	"github.com/nix-infra/nix-infra/agent/upload"
	"github.com/nix-infra/nix-infra/protocol"
)

// openTunnels makes the server of tunnels. What they reach is the node's policy's to say.
func (a *agent) openTunnels() *tunnel.Server {
	return tunnel.New(tunnel.Options{
		Node: a.machine.Name, Log: a.o.Log.With("part", "tunnel"), XKey: a.machine.XKey, Verifier: a.verifier,
		Audit: a.audit.Record, Publish: a.link.Publish, Idle: a.settle, Allow: a.allowTunnel,
		Upload: upload.New(upload.Options{Node: a.machine.Name, Log: a.o.Log.With("part", "upload"), Audit: a.audit.Record, Root: a.uploadRoot}).Serve,
	})
}

func (a *agent) uploadRoot(to string, role protocol.Role) (string, error) {
	allowed, err := policy.Load(a.system)
	if err != nil {
		return "", err
	}
	return allowed.UploadRoot(to, role)
}

func (a *agent) allowTunnel(to string, role protocol.Role) (dial, rule string, err error) {
	allowed, err := policy.Load(a.system)
	if err != nil {
		return "", "", err
	}
	if to, err = overOverlay(to); err != nil {
		return "", "", err
	}
	return allowed.Reach(to, role, ownAddresses)
}

// ownAddresses are those of the node's interfaces.
func ownAddresses() ([]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	return addresses(all), nil
}

func addresses(all []net.Addr) (own []netip.Addr) {
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				own = append(own, ip.Unmap())
			}
		}
	}
	return own
}

// overOverlay puts the node's own address in the overlay network in the place of protocol.OverlayHost.
func overOverlay(to string) (string, error) {
	host, port, err := net.SplitHostPort(to)
	if err != nil || host != protocol.OverlayHost {
		return to, nil
	}
	ip, err := heartbeat.OverlayIP()
	switch {
	case err != nil:
		return "", err
	case ip == "":
		return "", protocol.Refuse(protocol.Invalid, "the node is on no overlay network: it has no interface %s… with an address", heartbeat.OverlayInterface)
	}
	return net.JoinHostPort(ip, port), nil
}
