package nix

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var closure = StoreDir + "/" + hash + "-nixos-system-n1-25.11"

const key = "fleet-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="

func TestSubstitute(t *testing.T) {
	args := filepath.Join(t.TempDir(), "args")
	fake(t, "nix-store", `for a; do echo "$a"; done >`+args+`; echo "copying path 'x'" >&2; echo /tmp/link`)
	var log []string
	err := Substitute(t.Context(), SubstituteRequest{Path: closure, Caches: []string{"http://a/", "file:///b?priority=1"}, Keys: []string{key, key},
		OutLink: "/tmp/link", Log: func(l string) { log = append(log, l) }})
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(args)
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
	option := map[string]string{}
	for i := range got {
		if got[i] == "--option" {
			option[got[i+1]] = got[i+2]
		}
	}
	// Each of these is a promise: who may say what is taken, and that nothing is built.
	for name, want := range map[string]string{"substituters": "http://a/ file:///b?priority=1", "trusted-public-keys": key + " " + key,
		"require-sigs": "true", "max-jobs": "0", "builders": "", "substitute": "true", "fallback": "true", "narinfo-cache-negative-ttl": "0"} {
		if value, ok := option[name]; !ok || value != want {
			t.Errorf("option %s is %q", name, value)
		}
	}
	for _, pair := range [][2]string{{"--store", "local"}, {"--realise", closure}, {"--add-root", "/tmp/link"}} {
		if i := slices.Index(got, pair[0]); i < 0 || i+1 >= len(got) || got[i+1] != pair[1] {
			t.Errorf("no %v in %q", pair, got)
		}
	}
	if !slices.Contains(log, "copying path 'x'") {
		t.Errorf("log %q", log)
	}
}

func TestSubstituteFails(t *testing.T) {
	request := SubstituteRequest{Path: closure, Caches: []string{"http://a"}, Keys: []string{key}}
	missing := `echo "error: path '` + closure + `' is required, but there is no substituter that can build it" >&2; exit 1`
	for name, c := range map[string]struct{ script, want string }{
		"missing":  {missing, "no binary cache that can be reached has the closure, or a part of it: fetching the closure failed: path '" + closure + "' is required"},
		"as 2.26":  {`printf "don't know how to build these paths:\n  x\nerror: build of 'x' failed\n" >&2; exit 1`, "no binary cache that can be reached has the closure"},
		"else":     {`echo "error: database is locked" >&2; exit 1`, "fetching the closure failed: database is locked"},
		"unsigned": {`echo "warning: ignoring substitute for 'x' from 'http://a', as it's not signed by any of the keys in 'trusted-public-keys'" >&2; ` + missing, "without a signature of the deployment's keys (fleet-1)"},
		"long log": {`echo "error: cannot add path 'x' because it lacks a signature by a trusted key" >&2; yes | head -n 500 >&2; ` + missing, "without a signature of the deployment's keys"},
		"full":     {`echo "error: writing to file: No space left on device" >&2; exit 1`, "disk is full"},
	} {
		t.Run(name, func(t *testing.T) {
			fake(t, "nix-store", c.script)
			err := Substitute(t.Context(), request)
			var failed *RunError
			if !errors.As(err, &failed) || len(failed.Tail) == 0 || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want one line with %q", err, c.want)
			}
		})
	}
	fake(t, "nix-store", missing)
	if err := Substitute(t.Context(), SubstituteRequest{Path: closure}); err == nil || !strings.Contains(err.Error(), "names no binary cache") {
		t.Errorf("got %v", err)
	}
	fake(t, "nix-store", `echo called >&2; exit 1`)
	for _, bad := range []SubstituteRequest{
		{Path: "/etc/passwd"}, {Path: closure + ".drv"},
		{Path: closure, Caches: []string{"http://a?trusted=1"}}, {Path: closure, Caches: []string{"http://a/?x=1&trusted=true"}},
		{Path: closure, Caches: []string{"http://a http://evil"}}, {Path: closure, Caches: []string{"daemon"}},
	} {
		if err := Substitute(t.Context(), bad); err == nil || strings.Contains(err.Error(), "called") {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	fake(t, "nix-store", `sleep 1000`)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("superseded")
	cancel(why)
	if err := Substitute(ctx, request); !errors.Is(err, why) && !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestCopy(t *testing.T) {
	fakeNix(t, `echo "args: $*" >&2; case "$*" in *full*) echo "error: no room" >&2; exit 1;; esac`)
	var log []string
	if err := Copy(t.Context(), closure, "s3://bucket?region=x", func(l string) { log = append(log, l) }); err != nil {
		t.Fatal(err)
	}
	if want := "[args: --extra-experimental-features nix-command flakes copy --to s3://bucket?region=x " + closure + "]"; fmt.Sprint(log) != want {
		t.Errorf("%q", log)
	}
	if err := Copy(t.Context(), closure, "http://me:secret@full", nil); err == nil || !strings.Contains(err.Error(), "http://me:xxxxx@full failed: no room") {
		t.Errorf("got %v", err)
	}
	if err := Copy(t.Context(), "/etc", "http://a", nil); !errors.Is(err, ErrNotStorePath) {
		t.Errorf("got %v", err)
	}
}

// The secret key is in no argument and in no environment, and Nix can read it where it is told to.
func TestSign(t *testing.T) {
	const secret = "fleet-1:c2VjcmV0"
	seen := filepath.Join(t.TempDir(), "seen")
	fakeNix(t, `echo "args: $*" >&2; env >&2; file=$(echo "$*" | sed 's/.*--key-file \([^ ]*\) .*/\1/'); cat "$file" >`+seen)
	var log []string
	if err := Sign(t.Context(), SignRequest{Store: "file:///cache", Path: closure, Key: []byte(secret), Log: func(l string) { log = append(log, l) }}); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(seen); string(got) != secret {
		t.Errorf("Nix read %q", got)
	}
	want := "args: --extra-experimental-features nix-command flakes store sign --key-file /dev/fd/3 --recursive --store file:///cache " + closure
	if len(log) == 0 || log[0] != want {
		t.Errorf("%q", log)
	}
	for _, line := range log {
		if strings.Contains(line, "c2VjcmV0") {
			t.Errorf("the key is seen: %s", line)
		}
	}
	for _, bad := range []SignRequest{{Path: closure}, {Path: closure, Key: make([]byte, 1<<20)}, {Path: "/etc", Key: []byte(secret)}} {
		if Sign(t.Context(), bad) == nil {
			t.Errorf("%s with a key of %d bytes was signed", bad.Path, len(bad.Key))
		}
	}
}
