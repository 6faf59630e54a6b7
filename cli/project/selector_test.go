package project

import (
	"strings"
	"testing"
)

var fleet = []Candidate{
	{Name: "web2", Tags: []string{"web"}, Facts: map[string]string{"system": "aarch64-linux", "state": "confirmed"}},
	{Name: "web1", Tags: []string{"web", "canary"}, Facts: map[string]string{"system": "x86_64-linux", "state": "confirmed", "nixos": "25.11.20260101.abc"}},
	{Name: "db1", Tags: []string{"db"}, Facts: map[string]string{"system": "x86_64-linux", "state": "confirmed"}},
	{Name: "n1"}, {Name: "n2"}, {Name: "n10"},
}

func TestSelect(t *testing.T) {
	for exprs, want := range map[string]string{
		"all":                          "db1 n1 n10 n2 web1 web2",
		"web1":                         "web1",
		"web2 web1":                    "web1 web2",
		"web2,web1, web1":              "web1 web2",
		"web2|web1":                    "web1 web2", // two arguments
		"web*":                         "web1 web2",
		"n[12]":                        "n1 n2",
		"n?":                           "n1 n2",
		"n[12]*":                       "n1 n10 n2",
		"@web":                         "web1 web2",
		"@web,@db":                     "db1 web1 web2",
		"@*b":                          "db1 web1 web2",
		"system=x86_64-linux":          "db1 web1",
		"system=*-linux":               "db1 web1 web2",
		"nixos=25.11*":                 "web1",
		"not @web":                     "db1 n1 n10 n2",
		"not @web not n*":              "db1",
		"@web not web1":                "web2",
		"not web1 @web":                "web2",
		"@web,not,@canary":             "web2",
		"all not @web|not|system=*64*": "n1 n10 n2",
		"all not state=lost":           "db1 n1 n10 n2 web1 web2",
	} {
		got, err := Select(strings.Split(exprs, "|"), fleet)
		var names []string
		for _, c := range got {
			names = append(names, c.Name)
		}
		if err != nil || strings.Join(names, " ") != want {
			t.Errorf("%s: %v, %v; want %s", exprs, names, err, want)
		}
	}
	for exprs, want := range map[string][]string{
		"":                 {"no targets"},
		" , ":              {"no targets"},
		"not":              {`nothing follows "not"`},
		"web1 not":         {`nothing follows "not"`},
		"not not web1":     {`before another "not"`},
		"@":                {"target @: expected @tag or key=value"},
		"=x":               {"target =x: expected"},
		"system=":          {"target system=: expected"},
		"web[":             {"target web[: a bad pattern"},
		"@[":               {"target @[: a bad pattern"},
		"system=[":         {"target system=[: a bad pattern"},
		"web3":             {"target web3 matches no node; did you mean web1?"},
		"Web1":             {"target Web1 matches no node; did you mean web1?"},
		"web3,mail":        {"did you mean web1?", "target mail matches no node; the nodes: db1, n1, n10, n2, web1, web2"},
		"mail*":            {"target mail* matches no node; the nodes: "},
		"@canry":           {"target @canry matches no node; did you mean canary?"},
		"@mail":            {"target @mail matches no node; the tags: canary, db, web"},
		"all not @canry":   {"did you mean canary?"},
		"all not web3":     {"did you mean web1?"},
		"all not sistem=x": {"target sistem=x matches no node; the facts: "},
		"state=lost":       {"target state=lost matches no node"},
		"not all":          {"targets not all: nobody is left"},
		"web1 not web1":    {"nobody is left"},
		"web\x1b[2J":       {`target "web\x1b[2J": a bad pattern`},
	} {
		_, err := Select([]string{exprs}, fleet)
		failsWith(t, err, want...)
	}
	_, err := Select([]string{"all"}, nil)
	failsWith(t, err, "no nodes are known yet")
	_, err = Select([]string{"@web"}, fleet[3:])
	failsWith(t, err, "there are no tags")

	if (Selector{}).Match(fleet[0]) {
		t.Error("the empty selector chooses somebody")
	}
}

func TestHintListsAFew(t *testing.T) {
	have := strings.Fields("aa bb cc dd ee ff gg hh ii jj kk ll mm nn")
	if got := hint("unlike", "things", have); !strings.HasSuffix(got, "kk, ll and 2 more") {
		t.Error(got)
	}
}

func FuzzSelector(f *testing.F) {
	for _, s := range []string{"all", "web*,not @canary system=x", "n[1", "@\\", "not not", "a=b=c", "@=", "\xff*"} {
		f.Add(s, "web1", "web", "x")
	}
	f.Fuzz(func(t *testing.T, expr, name, tag, fact string) {
		c := Candidate{Name: name, Tags: []string{tag}, Facts: map[string]string{"system": fact}}
		chosen, err := Select([]string{expr}, []Candidate{c})
		if (err == nil) != (len(chosen) == 1) {
			t.Errorf("%q: %v, %v", expr, chosen, err)
		}
		s, perr := ParseSelector([]string{expr})
		if perr == nil && err == nil && !s.Match(c) {
			t.Errorf("%q selects what it does not match", expr)
		}
		if err != nil && strings.ContainsAny(err.Error(), "\x1b\x00") {
			t.Errorf("a message with control characters: %q", err)
		}
	})
}
