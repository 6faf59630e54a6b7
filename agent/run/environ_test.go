package run

import (
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestCheckPrivate(t *testing.T) {
	for _, name := range []string{"A", "a_B9", "_", "DB_PASSWORD", "PGPASSWORD", "NODE_ENV", "PATHOLOGY", "HOMEPAGE"} {
		if err := CheckPrivate(map[string]string{name: "x"}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"", "9A", "A B", "A-B", "A=B", "A\n", "É", "LD_PRELOAD", "LD_LIBRARY_PATH", "PATH", "BASH_ENV", "BASHOPTS", "BASH_FUNC_ls%%", "ENV", "IFS",
		"SHELLOPTS", "PS4", "PYTHONPATH", "PERL5OPT", "HOME", "GIT_SSH_COMMAND", strings.Repeat("A", 200)} {
		if err := CheckPrivate(map[string]string{name: "x"}); err == nil {
			t.Errorf("%q is taken", name)
		}
	}
	for _, value := range []string{"a\x00b", "\xff", "\uFFFE", "\uFDD0", "\U0010FFFF", strings.Repeat("x", protocol.MaxEnvSize)} {
		err := CheckPrivate(map[string]string{"SECRET": "hush" + value})
		if err == nil {
			t.Errorf("%.20q is taken", value)
		} else if strings.Contains(err.Error(), "hush") || strings.ContainsRune(err.Error(), '\n') {
			t.Errorf("the error tells the value: %v", err)
		}
	}
}

// TestEnvironmentFile: by systemd's rules for what is between double quotes. That systemd keeps to them, TestNodeEnvironment
// shows.
func TestEnvironmentFile(t *testing.T) {
	got := string(environmentFile(map[string]string{"B": "two\nlines", "A": `a"b\c$d` + "`e'f"}))
	want := `A="a\"b\\c\$d` + "\\`e'f\"\nB=\"two\nlines\"\n"
	if got != want {
		t.Errorf("got %s want %s", got, want)
	}
}
