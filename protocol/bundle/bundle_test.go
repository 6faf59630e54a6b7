package bundle_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/bundle"
)

// signed is a signed manifest of two files.
func signed(t testing.TB) (doc []byte, blobs map[string][]byte) {
	t.Helper()
	fleet, err := protocol.NewFleet("fleet")
	if err != nil {
		t.Fatal(err)
	}
	key, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	public, err := key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	token, err := fleet.Issue("ann", protocol.Deployer, public, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	m := &protocol.Manifest{Version: protocol.Version, Node: "web-1", Serial: 1, Deployment: "d-1", Created: time.Now(), Mode: protocol.Switch,
		Attr: protocol.SystemAttr("web-1"), Timeout: 30, BuildTimeout: 60}
	blobs = map[string][]byte{}
	for _, name := range []string{"a.nix", "b.nix", "c.nix"} {
		content := name[:1] // two files of other content than the third, which has that of the first
		if name == "c.nix" {
			content = "a"
		}
		digest := protocol.Digest([]byte(content))
		m.Files = append(m.Files, protocol.File{Path: name, SHA256: digest, Size: 1})
		blobs[digest] = []byte("packed " + content)
	}
	if doc, err = (&protocol.Signer{User: token, Key: key}).Manifest(m); err != nil {
		t.Fatal(err)
	}
	return doc, blobs
}

func write(t testing.TB) (file string, doc []byte, blobs map[string][]byte) {
	t.Helper()
	doc, blobs = signed(t)
	file = filepath.Join(t.TempDir(), "web-1.bundle")
	if err := bundle.Write(file, doc, func(digest string) ([]byte, error) { return blobs[digest], nil }); err != nil {
		t.Fatal(err)
	}
	return file, doc, blobs
}

// read is what Read hands out. It wants the blobs that it is told of.
func read(data []byte, wanted []string) (doc []byte, got map[string][]byte, err error) {
	got = map[string][]byte{}
	err = bundle.Read(bytes.NewReader(data), func(d []byte) ([]string, error) { doc = d; return wanted, nil },
		func(digest string, packed []byte) error {
			if got[digest] != nil {
				return errors.New("twice")
			}
			got[digest] = packed
			return nil
		})
	return doc, got, err
}

func digests(blobs map[string][]byte) (all []string) {
	for digest := range blobs {
		all = append(all, digest)
	}
	slices.Sort(all)
	return all
}

func TestThereAndBack(t *testing.T) {
	file, doc, blobs := write(t)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	gotDoc, got, err := read(data, digests(blobs))
	if err != nil || !bytes.Equal(gotDoc, doc) || fmt.Sprint(got) != fmt.Sprint(blobs) {
		t.Errorf("%d bytes of manifest, %q, %v", len(gotDoc), got, err)
	}
}

// A bundle that can't be made leaves what was there.
func TestWriteFails(t *testing.T) {
	doc, _ := signed(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "bundle")
	if err := os.WriteFile(file, []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	gone := errors.New("gone")
	if err := bundle.Write(file, doc, func(string) ([]byte, error) { return nil, gone }); !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}
	if err := bundle.Write(file, []byte("{}"), nil); err == nil {
		t.Error("a bundle of no manifest was made")
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "before" {
		t.Errorf("%q, %v", data, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}

type entry struct {
	h    tar.Header
	data string
}

func pack(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		e.h.Size = int64(len(e.data))
		if err := w.WriteHeader(&e.h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestHostileBundles(t *testing.T) {
	plain := func(name, data string) entry { return entry{tar.Header{Name: name, Typeflag: tar.TypeReg}, data} }
	a, b := strings.Repeat("a", 64), strings.Repeat("b", 64)
	manifest := plain("manifest", "doc")
	good := pack(t, manifest, plain("blobs/"+a, "A"), plain("blobs/"+b, "B"))
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"nothing":          {nil, "ends"},
		"text":             {[]byte(strings.Repeat("no bundle", 100)), "no bundle"},
		"no manifest":      {pack(t, plain("blobs/"+a, "A")), "in place of the manifest"},
		"blob missing":     {pack(t, manifest, plain("blobs/"+a, "A")), "ends before blob " + b},
		"other blob":       {pack(t, manifest, plain("blobs/"+a, "A"), plain("blobs/"+strings.Repeat("c", 64), "C")), "in place of blob " + b},
		"twice":            {pack(t, manifest, plain("blobs/"+a, "A"), plain("blobs/"+a, "A")), "in place of blob " + b},
		"out of order":     {pack(t, manifest, plain("blobs/"+b, "B"), plain("blobs/"+a, "A")), "in place of blob " + a},
		"one more":         {pack(t, manifest, plain("blobs/"+a, "A"), plain("blobs/"+b, "B"), plain("more", "")), "does not list"},
		"path out of it":   {pack(t, manifest, plain("../../etc/passwd", "A")), "in place of blob"},
		"link":             {pack(t, entry{tar.Header{Name: "manifest", Typeflag: tar.TypeSymlink, Linkname: "/etc/shadow"}, ""}), "not a plain file"},
		"folder":           {pack(t, entry{tar.Header{Name: "manifest/", Typeflag: tar.TypeDir}, ""}), "not a plain file"},
		"extended":         {pack(t, entry{tar.Header{Name: "manifest", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"NIX.x": "y"}}, "doc"}), "not a plain file"},
		"manifest too big": {pack(t, plain("manifest", strings.Repeat("x", protocol.MaxMessage+1))), "are possible"},
		"blob too big":     {pack(t, manifest, plain("blobs/"+a, strings.Repeat("x", protocol.MaxBlobSize+1))), "are possible"},
		"cut in a blob":    {good[:512*3+100], "bundle"},
		"cut in a header":  {good[:512*2+100], "bundle"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := read(c.data, []string{b, a}); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	if _, got, err := read(good, []string{b, a}); err != nil || string(got[a]) != "A" || string(got[b]) != "B" {
		t.Errorf("%v, %v", got, err)
	}
}

// What its receiver refuses is read no further.
func TestRefusedManifest(t *testing.T) {
	file, _, _ := write(t)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	no := errors.New("not for this node")
	err = bundle.Read(bytes.NewReader(data), func([]byte) ([]string, error) { return nil, no }, func(string, []byte) error {
		t.Error("a blob was read")
		return nil
	})
	if !errors.Is(err, no) {
		t.Error(err)
	}
}

func FuzzRead(f *testing.F) {
	file, _, blobs := write(f)
	data, err := os.ReadFile(file)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(data[:700])
	f.Add(pack(f, entry{tar.Header{Name: "manifest", Typeflag: tar.TypeReg}, "x"}))
	wanted := digests(blobs)
	f.Fuzz(func(t *testing.T, data []byte) {
		doc, got, err := read(data, wanted)
		if err == nil && (len(got) != len(wanted) || len(doc) > protocol.MaxMessage) {
			t.Errorf("taken with %d of %d blobs", len(got), len(wanted))
		}
		for digest := range got {
			if !slices.Contains(wanted, digest) {
				t.Errorf("blob %q, which nobody asked for", digest)
			}
		}
	})
}
