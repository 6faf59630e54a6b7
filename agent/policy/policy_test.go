package policy

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	p, err := Parse([]byte(`{"v":1,"files":{"roots":["/var/lib/app","/srv/www"]}}`))
	if err != nil || !slices.Equal(p.Files.Roots, []string{"/var/lib/app", "/srv/www"}) {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err := Parse([]byte(`{"v":1}`)); err != nil || len(p.Files.Roots) != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	for _, c := range []struct{ text, says string }{
		{``, "can't be decoded"}, {`{}`, `"v"`}, {`{"v":2}`, "version 1"}, {`{"v":1}{"v":1}`, "follows"}, {`{"v":1,"file":{}}`, "unknown field"},
		{`{"v":1,"files":{"root":["/a"]}}`, "unknown field"}, {`{"v":1,"files":{"roots":"/a"}}`, "can't be decoded"},
		{`{"v":1,"files":{"roots":["/"]}}`, "files.roots"}, {`{"v":1,"files":{"roots":["a"]}}`, "files.roots"}, {`{"v":1,"files":{"roots":["/a/../etc"]}}`, "files.roots"},
		{`{"v":1,"files":{"roots":["/a/"]}}`, "files.roots"}, {`{"v":1,"files":{"roots":["/a\n"]}}`, "files.roots"}, {`{"v":1,"files":{"roots":[""]}}`, "files.roots"},
		{`{"v":1,"files":{"roots":[` + strings.Repeat(`"/a",`, 32) + `"/a"]}}`, "33 roots"}, {strings.Repeat(" ", maxFile+1), "more than"},
	} {
		if _, err := Parse([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.80s: %v", c.text, err)
		}
	}
}

func TestLoad(t *testing.T) {
	system := t.TempDir()
	if p, err := Load(system); err != nil || p.Files.Roots != nil {
		t.Errorf("without a file: %+v, %v", p, err)
	}
	file := filepath.Join(system, File)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	for text, good := range map[string]bool{`{"v":1,"files":{"roots":["/a"]}}`: true, `{"v":3}`: false} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if p, err := Load(system); (err == nil) != good || good && p.Files.Roots[0] != "/a" {
			t.Errorf("%s: %+v, %v", text, p, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"v":1,"files":{"roots":["/var/lib/app"]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse(data)
		if err != nil {
			return
		}
		for _, r := range p.Files.Roots {
			if r == "/" || !filepath.IsAbs(r) || filepath.Clean(r) != r {
				t.Fatalf("root %q", r)
			}
		}
	})
}
