package nix

import (
	"bytes"
	"context"
	"io"
	"strings"
)

// maxHeap is how much memory an evaluation may take. Code that takes ever more ends with Nix's own error, and not with the machine's.
const maxHeap = "6G"

// Eval evaluates a flake's attribute to the path of its derivation, and builds nothing: what could only be evaluated by building
// something first (import from derivation) is an error. It ends with ctx; an evaluation that Nix itself gave up is a *RunError.
//
// The code may be anybody's. It reaches the folder and the inputs that flake.lock names, which is completed first, and nothing else of this
// machine or the web. That it is evaluated purely is not enough for that: fetchTree takes any path whose hash is given, and tells the hash
// where a wrong one is.
func Eval(ctx context.Context, dir, attr string, log func(line string)) (string, error) {
	if err := Lock(ctx, dir, nil); err != nil {
		return "", err
	}
	inputs, err := inputURIs(dir)
	if err != nil {
		return "", err
	}
	out := &bounded{limit: maxPrinted}
	err = job{what: "the evaluation", program: "nix", log: log, out: out, env: []string{"GC_MAXIMUM_HEAP_SIZE=" + maxHeap}, args: []string{"--extra-experimental-features", features,
		"eval", "--raw", "path:" + dir + "#" + attr + ".drvPath", "--no-write-lock-file", "--show-trace",
		"--option", "pure-eval", "true", "--option", "restrict-eval", "true", "--option", "allowed-uris", strings.Join(inputs, " "),
		"--option", "allow-unsafe-native-code-during-evaluation", "false",
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
