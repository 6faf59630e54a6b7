package reconcile

import (
	"context"
	"fmt"
)

// CollectGarbage takes generations of the system profile away, by their numbers, and then deletes all that nothing
// refers to any more; it tells how many store paths and bytes that were. What Keep names has a gc root of its own, or
// is a generation that must not be among the numbers. It is to be run by Idle: a system that is about to be activated
// might be what is deleted.
//
// The boot menu is written anew in between: what it offers has to be there.
func (e *Engine) CollectGarbage(ctx context.Context, numbers []int) (paths int, freed int64, err error) {
	if err := e.o.Host.DeleteGenerations(ctx, numbers); err != nil {
		return 0, 0, err
	}
	obs, err := e.observe(ctx)
	if err != nil {
		return 0, 0, err
	}
	if obs.Profile != "" {
		j := Job{Unit: unitPrefix + "boot-menu.service", Closure: obs.Profile, Action: "boot", Timeout: bootTimeout, Again: true, Forget: true}
		if err := e.runBoot(ctx, j); err != nil {
			return 0, 0, fmt.Errorf("nothing was deleted, because the boot menu still offers it: %w", err)
		}
	}
	return e.o.Host.CollectGarbage(ctx)
}
