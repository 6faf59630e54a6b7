package protocol

import (
	"strings"
	"testing"
)

// TestQueryForms: what the queries of a viewer may have in them, since some of it becomes options of a program.
func TestQueryForms(t *testing.T) {
	level, above := 3, 8
	good := []interface{ Validate() error }{
		&UnitsQuery{}, &UnitsQuery{States: []string{"failed", "auto-restart"}, Patterns: []string{"nginx*", "[!a]*.timer"}, After: "a.service", Limit: 3},
		&UnitQuery{Name: "getty@tty1.service", Lines: 10}, &UnitQuery{Name: `dev-disk-by\x2duuid.device`}, &UnitQuery{Name: "-.mount"},
		&JournalQuery{}, &JournalQuery{Units: []string{"nginx.service", "web*"}, Identifiers: []string{"-x", "a b"}, Since: 1, Until: 2, Priority: &level, Grep: "--x", Boot: "-1",
			Lines: 5000, Before: "s=0123abcd;i=1f;b=" + strings.Repeat("a", 32) + ";m=1;t=2;x=3"},
		&JournalQuery{Boot: strings.Repeat("0", 32)}, &JournalQuery{Boot: "0"},
		&StatsQuery{}, &StatsQuery{Operations: StatsOperations, Top: 100},
		&FilesQuery{Path: "/etc/nixos"}, &FilesQuery{Path: "/", Offset: 1, Limit: 1, After: "a"},
		&StreamOrder{Request: "abc-1"},
	}
	for _, q := range good {
		if err := q.Validate(); err != nil {
			t.Errorf("%+v: %v", q, err)
		}
	}
	bad := []interface{ Validate() error }{
		&UnitsQuery{States: []string{"Failed"}}, &UnitsQuery{States: []string{"--all"}}, &UnitsQuery{States: []string{""}}, &UnitsQuery{States: make([]string, 17)},
		&UnitsQuery{Patterns: []string{"a b"}}, &UnitsQuery{Patterns: []string{"a;b"}}, &UnitsQuery{Patterns: []string{"a/b"}}, &UnitsQuery{Patterns: []string{"--host=x"}}, &UnitsQuery{Limit: -1}, &UnitsQuery{After: "a\n"},
		&UnitQuery{}, &UnitQuery{Name: "nginx"}, &UnitQuery{Name: "a*.service"}, &UnitQuery{Name: "../a.service"}, &UnitQuery{Name: "a.service", Lines: MaxUnitLog + 1}, &UnitQuery{Name: "a.service", Lines: -1},
		&JournalQuery{Units: []string{"--vacuum-size=1"}}, &JournalQuery{Units: []string{"a\n"}}, &JournalQuery{Units: []string{"a\x00"}}, &JournalQuery{Units: []string{""}},
		&JournalQuery{Identifiers: []string{""}}, &JournalQuery{Identifiers: []string{"a\nb"}}, &JournalQuery{Identifiers: []string{strings.Repeat("a", 256)}}, &JournalQuery{Identifiers: make([]string, 65)},
		&JournalQuery{Since: -1}, &JournalQuery{Until: 1 << 62}, &JournalQuery{Priority: &above}, &JournalQuery{Grep: "a\nb"}, &JournalQuery{Grep: strings.Repeat("a", 1001)},
		&JournalQuery{Boot: "all"}, &JournalQuery{Boot: "--rotate"}, &JournalQuery{Boot: "1 2"}, &JournalQuery{Lines: MaxLines + 1}, &JournalQuery{Lines: -1}, &JournalQuery{Before: "now"}, &JournalQuery{Before: "s=a --x"},
		&StatsQuery{Operations: []string{"everything"}}, &StatsQuery{Operations: append([]string{"memory"}, StatsOperations...)}, &StatsQuery{Top: 101}, &StatsQuery{Top: -1},
		&FilesQuery{}, &FilesQuery{Path: "etc"}, &FilesQuery{Path: "/etc/../root"}, &FilesQuery{Path: "/etc/"}, &FilesQuery{Path: "/a\x00"}, &FilesQuery{Path: "/" + strings.Repeat("a", 4096)}, &FilesQuery{Path: "/a", Offset: -1}, &FilesQuery{Path: "/a", Limit: -1}, &FilesQuery{Path: "/a", After: "a/b"},
		&StreamOrder{}, &StreamOrder{Request: "a.b"}, &StreamOrder{Request: ">"},
	}
	for _, q := range bad {
		if err := q.Validate(); err == nil {
			t.Errorf("%+v was taken", q)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: more than a line: %v", q, err)
		}
	}
}

// TestQueryRoles: all questions of query.go are a viewer's.
func TestQueryRoles(t *testing.T) {
	for _, a := range []Action{ListUnits, ShowUnit, ReadJournal, FollowJournal, ReadStats, ReadFiles, Stream} {
		if r := LeastRole(a); r != Viewer {
			t.Errorf("%s needs %s", a, r)
		}
	}
}

func FuzzUnitsQuery(f *testing.F) {
	fuzzDecode[UnitsQuery](f, UnitsQuery{States: []string{"failed"}, Patterns: []string{"a*"}, Limit: 1})
}
func FuzzUnitQuery(f *testing.F) {
	fuzzDecode[UnitQuery](f, UnitQuery{Name: "a.service", Lines: 5})
}
func FuzzStatsQuery(f *testing.F) {
	fuzzDecode[StatsQuery](f, StatsQuery{Operations: []string{"memory"}})
}
func FuzzFilesQuery(f *testing.F) {
	fuzzDecode[FilesQuery](f, FilesQuery{Path: "/etc/nixos", Limit: 5})
}
func FuzzStreamOrder(f *testing.F) {
	fuzzDecode[StreamOrder](f, StreamOrder{Request: "abc", End: true})
}
func FuzzJournalQuery(f *testing.F) {
	priority := 3
	fuzzDecode[JournalQuery](f, JournalQuery{Units: []string{"a"}, Priority: &priority, Grep: "x", Boot: "-1", Lines: 5, Before: "s=1;i=2"})
}
