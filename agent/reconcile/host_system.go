package reconcile

import (
	"context"
	"fmt"

	"github.com/nix-infra/nix-infra/agent/health"
	"github.com/nix-infra/nix-infra/nix"
)

// Declared implements Host.
func (h *SystemdHost) Declared(closure string) ([]health.Declaration, error) {
	return health.Declared(closure)
}

// UnitState implements Host.
func (h *SystemdHost) UnitState(ctx context.Context, unit string) (string, error) {
	c, err := connect(ctx)
	if err != nil {
		return "", err
	}
	defer c.Close()
	s, err := statusOf(ctx, c, unit)
	if err != nil {
		return "", err
	}
	switch s.load {
	case "loaded":
		return s.active, nil
	case "not-found":
		return s.load, nil
	}
	return "", fmt.Errorf("%s can't be loaded: systemd calls it %s", unit, s.load)
}

// DeleteGenerations implements Host.
func (h *SystemdHost) DeleteGenerations(ctx context.Context, numbers []int) error {
	return nix.DeleteGenerations(ctx, numbers)
}

// CollectGarbage implements Host.
func (h *SystemdHost) CollectGarbage(ctx context.Context) (paths int, freed int64, err error) {
	return nix.CollectGarbage(ctx)
}

// ClosureInfo implements Host.
func (h *SystemdHost) ClosureInfo(ctx context.Context, closure string) ([]nix.PathInfo, error) {
	return nix.ClosureInfo(ctx, closure)
}
