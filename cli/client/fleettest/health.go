package fleettest

import "github.com/nix-infra/nix-infra/protocol"

// Health is what the controller says of itself from here on; nil: it is older than the question. Until then it is well.
func (f *Fleet) Health(h *protocol.ControllerHealth) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.health = h
}

func (f *Fleet) showHealth() (any, error) {
	if f.health == nil {
		return nil, protocol.Refuse(protocol.Unknown, "no action here")
	}
	h := *f.health
	if h.Time.IsZero() {
		h.Time = f.now().UTC()
	}
	return h, nil
}
