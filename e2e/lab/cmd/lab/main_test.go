package main

import (
	"strings"
	"testing"
)

// What is wrong with a command line must be said without a lab, and before anything is done.
func TestUsage(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"", "which command?"},
		{"frobnicate", `no command "frobnicate"`},
		{"--nmae x list", "flag provided but not defined"},
		{"up", "up how many?"},
		{"up none", "not a number"},
		{"up 0", "not a number"},
		{"up 2 3", "up how many?"},
	} {
		var out strings.Builder
		err := run(t.Context(), strings.Fields(c.args), &out, &out)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("lab %s: %v", c.args, err)
		}
	}
	for _, args := range []string{"--help", "help"} {
		var out strings.Builder
		if err := run(t.Context(), []string{args}, &out, &out); err != nil || out.String() != usage {
			t.Errorf("lab %s: %v", args, err)
		}
	}
	for _, command := range append(append([]string{"up", "renew", "list", "gc"}, onLab...), onNodes...) {
		if !strings.Contains(usage, "\n  "+command+" ") {
			t.Errorf("the usage does not tell of %s", command)
		}
	}
}
