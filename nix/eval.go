package nix

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"path"
	"strings"
)

// Eval evaluates a flake's attribute to the path of its derivation, and builds nothing: what could only be evaluated by building
// something first (import from derivation) is an error. It ends with ctx; an evaluation that Nix itself gave up is a *RunError.
func Eval(ctx context.Context, dir, attr string, log func(line string)) (string, error) {
	if !path.IsAbs(dir) || strings.ContainsAny(dir, "#?%") {
		return "", fmt.Errorf("folder %q can't be named in a flake reference: it has to be absolute, without #, ? and %%", dir)
	}
	out := &bounded{limit: maxPrinted}
	err := job{what: "the evaluation", program: "nix", log: log, out: out, args: []string{"--extra-experimental-features", features,
		"eval", "--raw", "path:" + dir + "#" + attr + ".drvPath", "--no-write-lock-file", "--show-trace",
		"--option", "allow-import-from-derivation", "false", "--option", "eval-cache", "false", "--option", "warn-dirty", "false"}}.run(ctx)
	if err != nil {
		return "", err
	}
	drv := string(bytes.TrimSpace(out.data))
	return drv, CheckStorePath(drv)
}

// Parse tells whether a file is Nix code, without evaluating it. Else it is a *RunError.
func Parse(ctx context.Context, file string) error {
	return job{what: "parsing", program: "nix-instantiate", args: []string{"--parse", file}, out: io.Discard}.run(ctx)
}
