package health

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const example = `{"v":1,"checks":[
 {"name":"web","kind":"http","url":"http://127.0.0.1:8080/ping","status":200,"body":"pong","interval":0.5,"timeout":10,"grace":60},
 {"name":"db","kind":"tcp","address":"127.0.0.1:5432"},
 {"name":"app","kind":"unit","unit":"hello@a\\x2db.service","grace":0},
 {"name":"migrated","kind":"command","command":["/run/current-system/sw/bin/check","--all"]},
 {"name":"flag","kind":"file","path":"/run/app/ready","contains":"ok"},
 {"name":"grüße","kind":"http","url":"https://[::1]/","body":null,"body_regex":"^ok$"}]}`

func TestDeclared(t *testing.T) {
	system := t.TempDir()
	if all, err := Declared(system); len(all) != 0 || err != nil {
		t.Errorf("a system that declares nothing: %v, %v", all, err)
	}
	file := filepath.Join(system, File)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(content string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(example)
	all, err := Declared(system)
	if err != nil || len(all) != 6 {
		t.Fatalf("%d checks, %v", len(all), err)
	}
	if d := all[0]; d.Name != "web" || d.Kind != "http" || d.Interval != 500*time.Millisecond || d.Timeout != 10*time.Second || d.Grace != time.Minute {
		t.Errorf("%+v", d)
	}
	if d := all[1]; d.Interval != 2*time.Second || d.Timeout != 5*time.Second || d.Grace != 30*time.Second {
		t.Errorf("defaults: %+v", d)
	}
	if all[2].Grace != 0 {
		t.Errorf("no grace: %+v", all[2])
	}
	write(`{"v":1,"checks":[{"name":"web","kind":"http"}]}`)
	if _, err := Declared(system); err == nil || err.Error() != `etc/nix-infra/health.json of the system: check "web": field "url" is missing; a check of kind http needs it; docs/health.md has the form` {
		t.Errorf("got %v", err)
	}
	write(`{"v":1,"checks":[]}` + strings.Repeat(" ", maxFile))
	if _, err := Declared(system); err == nil {
		t.Error("a file without end was read")
	}
	// Only a file that is not there declares nothing.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(file, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Declared(system); err == nil {
		t.Error("a folder in the file's place passed for no file")
	}
}

func TestParseRefuses(t *testing.T) {
	check := func(fields string) string { return `{"v":1,"checks":[{"name":"web",` + fields + `}]}` }
	for document, want := range map[string][]string{
		``:                                   {"can't be decoded"},
		`[]`:                                 {"can't be decoded"},
		`{"v":1,"checks":[]} {}`:             {"follows"},
		`{"checks":[]}`:                      {`"v"`},
		`{"v":2,"checks":[]}`:                {`"v"`, "version 1"},
		`{"v":1,"check":[]}`:                 {`"check"`},
		`{"v":1,"checks":[7]}`:               {"check number 1", "no object"},
		`{"v":1,"checks":[null]}`:            {"check number 1", "no object"},
		`{"v":1,"checks":[{"kind":"tcp"}]}`:  {"check number 1", `"name"`},
		`{"v":1,"checks":[{"name":"a\nb"}]}`: {"check number 1", `"name"`},
		`{"v":1,"checks":[{"name":7,"kind":"tcp"}]}`:                                       {"check number 1", `"name"`},
		check(`"kind":"ping"`):                                                             {`"web"`, `"kind"`, "command, file, http, tcp, unit"},
		check(`"kind":7`):                                                                  {`"web"`, `"kind"`},
		check(`"Kind":"tcp"`):                                                              {`"web"`},
		check(`"kind":"tcp","address":"a:1","x":1`):                                        {`"web"`, `"x"`, "unknown", "address"},
		check(`"kind":"tcp","address":"a:1","url":1`):                                      {`"web"`, `"url"`},
		check(`"kind":"unit","unit":"a.service","contains":"x"`):                           {`"web"`, `"contains"`, "unknown"},
		check(`"kind":"tcp"`):                                                              {`"web"`, `"address"`, "missing"},
		check(`"kind":"tcp","address":null`):                                               {`"web"`, `"address"`, "missing"},
		check(`"kind":"tcp","address":"localhost"`):                                        {`"web"`, `"address"`},
		check(`"kind":"tcp","address":":80"`):                                              {`"web"`, `"address"`},
		check(`"kind":"tcp","address":"a:0"`):                                              {`"web"`, `"address"`},
		check(`"kind":"tcp","address":"a:http"`):                                           {`"web"`, `"address"`},
		check(`"kind":"tcp","address":"a:1","interval":0`):                                 {`"web"`, `"interval"`},
		check(`"kind":"tcp","address":"a:1","interval":"2s"`):                              {`"web"`, `"interval"`},
		check(`"kind":"tcp","address":"a:1","timeout":-1`):                                 {`"web"`, `"timeout"`},
		check(`"kind":"tcp","address":"a:1","timeout":1e300`):                              {`"web"`, `"timeout"`},
		check(`"kind":"tcp","address":"a:1","grace":100000`):                               {`"web"`, `"grace"`},
		check(`"kind":"unit","unit":"hello"`):                                              {`"web"`, `"unit"`},
		check(`"kind":"unit","unit":"../x.service"`):                                       {`"web"`, `"unit"`},
		check(`"kind":"http","url":"ftp://a/"`):                                            {`"web"`, `"url"`},
		check(`"kind":"http","url":"/ping"`):                                               {`"web"`, `"url"`},
		check(`"kind":"http","url":"http://u:p@a/"`):                                       {`"web"`, `"url"`, "everybody"},
		check(`"kind":"http","url":"http://a","status":0`):                                 {`"web"`, `"status"`},
		check(`"kind":"http","url":"http://a","status":2000`):                              {`"web"`, `"status"`},
		check(`"kind":"http","url":"http://a","status":"ok"`):                              {`"web"`, `"status"`},
		check(`"kind":"http","url":"http://a","body":""`):                                  {`"web"`, `"body"`},
		check(`"kind":"http","url":"http://a","body_regex":"("`):                           {`"web"`, `"body_regex"`},
		check(`"kind":"command","command":[]`):                                             {`"web"`, `"command"`},
		check(`"kind":"command","command":"true"`):                                         {`"web"`, `"command"`},
		check(`"kind":"command","command":["true"]`):                                       {`"web"`, `"command"`, "absolute"},
		check(`"kind":"command","command":["/bin/true","a\u0000"]`):                        {`"web"`, `"command"`},
		check(`"kind":"file","path":"ready"`):                                              {`"web"`, `"path"`},
		check(`"kind":"file","path":"/ready","contains":""`):                               {`"web"`, `"contains"`},
		check(`"kind":"file","path":"/a"},{"name":"web","kind":"unit","unit":"a.service"`): {`"web"`, `"name"`, "another"},
		`{"v":1,"checks":[` + strings.Repeat(`{},`, protocol.MaxChecks) + `{}]}`:           {"checks", fmt.Sprint(protocol.MaxChecks)},
	} {
		_, err := Parse([]byte(document))
		if err == nil {
			t.Errorf("taken: %.200s", document)
			continue
		}
		for _, part := range append(want, "") {
			if !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%.200s: %q, expected %s in one line", document, err, part)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(example))
	f.Add([]byte(`{"v":1,"checks":[{"name":"a","kind":"http","url":"http://%31"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := Parse(data)
		if err != nil && (all != nil || strings.ContainsAny(err.Error(), "\n\x00")) {
			t.Errorf("%d checks and %q", len(all), err)
		}
		names := map[string]bool{}
		for _, d := range all {
			if names[d.Name] || checkName(d.Name) != nil || d.Interval < 100*time.Millisecond || d.Timeout < 100*time.Millisecond || d.Grace < 0 || d.probe == nil {
				t.Errorf("taken: %+v", d)
			}
			names[d.Name] = true
		}
		if len(all) > protocol.MaxChecks {
			t.Errorf("%d checks", len(all))
		}
	})
}
