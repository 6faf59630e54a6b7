package nix

import (
	"context"
	"fmt"
	"path"
	"strings"
)

// Lock writes flake.lock into the folder of a flake, which is asked for nothing but its inputs. What is locked already
// stays.
func Lock(ctx context.Context, dir string, log func(line string)) error {
	if !path.IsAbs(dir) || strings.ContainsAny(dir, "#?%") {
		return fmt.Errorf("folder %q can't be named in a flake reference: it has to be absolute, without #, ? and %%", dir)
	}
	return job{what: "locking the flake", program: "nix", args: []string{"--extra-experimental-features", features, "flake", "lock", "path:" + dir}, log: log}.run(ctx)
}
