package heartbeat

import (
	"fmt"
	"net"
	"strings"
)

// OverlayInterface begins the name of the interface that flannel makes for the overlay network of a cluster.
const OverlayInterface = "flannel"

// OverlayIP is this machine's own IPv4 address in the overlay network of its cluster, "" where it is in none.
func OverlayIP() (string, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return "", fmt.Errorf("the node's interfaces can't be read: %w", err)
	}
	for _, i := range interfaces {
		if !strings.HasPrefix(i.Name, OverlayInterface) {
			continue
		}
		addresses, err := i.Addrs()
		if err != nil {
			return "", fmt.Errorf("the addresses of %s can't be read: %w", i.Name, err)
		}
		for _, a := range addresses {
			if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil {
				return n.IP.To4().String(), nil
			}
		}
	}
	return "", nil
}
