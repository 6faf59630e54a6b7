package nix

import (
	"reflect"
	"strings"
	"testing"
)

func TestClosureInfo(t *testing.T) {
	a, b := StoreDir+"/"+hash+"-a", StoreDir+"/"+hash+"-longer-1.2"
	fakeNix(t, `case "$*" in *" path-info --recursive --size `+a+`") ;; *) exit 9;; esac
printf '%s         \t%11d\n' `+a+` 4096; printf '%s\t%11d\n' `+b+` 12345678901`)
	got, err := ClosureInfo(t.Context(), a)
	if want := []PathInfo{{a, 4096}, {b, 12345678901}}; err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%v, %v", got, err)
	}
	if size := ClosureSize(got); size != 12345682997 {
		t.Errorf("%d bytes", size)
	}
	for script, want := range map[string]string{
		`echo "/etc/passwd 12"`:          "not a path and a size",
		`echo "` + a + `"`:               "not a path and a size",
		`echo "` + a + ` -5"`:            "not a path and a size",
		`echo "` + a + ` 5 MiB"`:         "not a path and a size",
		`:`:                              "printed nothing",
		`yes | head -c 20000000; exit 0`: "short write",
		`echo "error: path 'x' is not valid" >&2; exit 1`: "listing the closure failed: path 'x' is not valid",
	} {
		fakeNix(t, script)
		if got, err := ClosureInfo(t.Context(), a); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v", script, got, err)
		}
	}
}

func TestSplitName(t *testing.T) {
	for name, want := range map[string][2]string{
		"hello-2.12.1":                   {"hello", "2.12.1"},
		"apache-httpd-2.0.48":            {"apache-httpd", "2.0.48"}, // Nix's own example
		"openssl-3.0.14-bin":             {"openssl", "3.0.14"},
		"glibc-2.40-66-lib32":            {"glibc", "2.40-66"},
		"firefox-unwrapped-130.0":        {"firefox-unwrapped", "130.0"},
		"etc":                            {"etc", ""},
		"unit-hello.service":             {"unit-hello.service", ""},
		"nixos-system-n1-25.11.20250801": {"nixos-system-n1", "25.11.20250801"},
		"foo-unstable":                   {"foo", ""}, // as ambiguous as Nix says
		"X11-fonts-1":                    {"X11-fonts", "1"},
		"source":                         {"source", ""},
		"a-":                             {"a-", ""},
		"linux-6.12.1-modules-shrunk":    {"linux", "6.12.1-modules"},
		"perl5.40.0-URI-5.21":            {"perl5.40.0-URI", "5.21"},
	} {
		if pname, version := splitName(name); pname != want[0] || version != want[1] {
			t.Errorf("%s: %q %q, want %q", name, pname, version, want)
		}
	}
}

func TestDiffClosures(t *testing.T) {
	of := func(names map[string]int64) (all []PathInfo) {
		for name, size := range names {
			all = append(all, PathInfo{StoreDir + "/" + hash + "-" + name, size})
		}
		return all
	}
	before := of(map[string]int64{"hello-1.0": 100, "gone-2": 50, "same-1": 9000, "same-1-bin": 10, "grows-1": 1000, "two-1": 5, "bare": 7, "becomes": 7})
	after := of(map[string]int64{"hello-1.1": 130, "same-1": 9001, "same-1-bin": 10, "grows-1": 9192, "two-1": 5, "two-2": 6, "bare": 8, "becomes-1": 7, "comes-3-dev": 20, "comes-3": 1})
	want := []PackageChange{
		{Name: "becomes", Before: []string{""}, After: []string{"1"}},
		{Name: "comes", After: []string{"3"}, Growth: 21},
		{Name: "gone", Before: []string{"2"}, Growth: -50},
		{Name: "grows", Before: []string{"1"}, After: []string{"1"}, Growth: 8192},
		{Name: "hello", Before: []string{"1.0"}, After: []string{"1.1"}, Growth: 30},
		{Name: "two", Before: []string{"1"}, After: []string{"1", "2"}, Growth: 6},
	}
	if got := DiffClosures(before, after); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if got := DiffClosures(after, after); len(got) != 0 {
		t.Errorf("a closure differs from itself: %+v", got)
	}
}
