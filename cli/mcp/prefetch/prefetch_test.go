package prefetch

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// The forms of some hashes, as Nix's own programs print them.
var forms = []struct{ hex, nix32, sri string }{
	{"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73", "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="},
	{"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s", "sha256-ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="},
}

func TestForms(t *testing.T) {
	for _, c := range forms {
		for from, text := range map[string]string{Hex: c.hex, Nix32: c.nix32, SRI: c.sri} {
			for _, how := range []string{from, ""} {
				h, err := ParseHash(text, how)
				if err != nil || h.Form(Hex) != c.hex || h.Form(Nix32) != c.nix32 || h.Form(SRI) != c.sri {
					t.Errorf("%s as %q: %s %s %s %v", text, how, h.Form(Hex), h.Form(Nix32), h.Form(SRI), err)
				}
			}
		}
	}
	if h, err := ParseHash(" 47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n", ""); err != nil || h.Form(Hex) != forms[0].hex {
		t.Errorf("without its prefix: %v", err)
	}
	for _, bad := range []string{"", "x", forms[0].hex[:63], forms[0].hex + "0", forms[0].nix32[:51], forms[0].nix32 + "0", "z" + forms[0].nix32[1:], strings.Repeat("e", 52), "sha256-", "sha256-AAAA", "sha512-" + forms[0].sri[7:], strings.Repeat("A", 44), "$(id)", strings.Repeat("a", 100000), "\x00"} {
		if h, err := ParseHash(bad, ""); err == nil {
			t.Errorf("%.80q was read as %s", bad, h.Form(Hex))
		}
	}
	if _, err := ParseHash(forms[0].hex, "base58"); err == nil {
		t.Error("base58 is a form")
	}
	for range 500 {
		var h Hash
		_, _ = rand.Read(h[:])
		for _, form := range []string{Nix32, SRI, Hex} {
			if back, err := ParseHash(h.Form(form), ""); err != nil || back != h {
				t.Fatalf("%x as %s is %s, and back %x (%v)", h, form, h.Form(form), back, err)
			}
		}
	}
}

func FuzzParseHash(f *testing.F) {
	for _, c := range forms {
		f.Add(c.hex, "")
		f.Add(c.nix32, Nix32)
		f.Add(c.sri, SRI)
	}
	f.Fuzz(func(t *testing.T, s, from string) {
		h, err := ParseHash(s, from)
		if err != nil {
			return
		}
		if back, err := ParseHash(h.Form(Nix32), Nix32); err != nil || back != h {
			t.Fatalf("%q: %x, and back %x (%v)", s, h, back, err)
		}
	})
}

// member is an entry of an archive.
type member struct {
	name, content string
	mode          int64
	kind          byte
}

func tarOf(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := &tar.Header{Name: m.name, Mode: m.mode, Typeflag: m.kind}
		if m.kind == tar.TypeSymlink || m.kind == tar.TypeLink {
			h.Linkname = m.content
		} else {
			h.Size = int64(len(m.content))
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if m.kind == tar.TypeReg {
			if _, err := io.WriteString(w, m.content); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zipOf(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for _, m := range members {
		h := &zip.FileHeader{Name: m.name, Method: zip.Deflate}
		mode := fs.FileMode(m.mode)
		if m.kind == tar.TypeSymlink {
			mode |= fs.ModeSymlink
		}
		h.SetMode(mode)
		f, err := w.CreateHeader(h)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(f, m.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(data []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write(data)
	_ = w.Close()
	return b.Bytes()
}

// content is a small tree, below one folder as forges pack it.
var content = []member{
	{"top/", "", 0o755, tar.TypeDir},
	{"./top/run.sh", "#!/bin/sh\n", 0o755, tar.TypeReg},
	{"top/a/b.txt", "12345678", 0o644, tar.TypeReg},
	{"top/a/empty", "", 0o644, tar.TypeReg},
	{"top/link", "a/b.txt", 0o777, tar.TypeSymlink},
}

// contentNAR is that tree as a NAR, written out by hand.
func contentNAR() []byte {
	var b bytes.Buffer
	for s := range strings.FieldsSeq(`nix-archive-1 ( type directory
		entry ( name a node ( type directory
			entry ( name b.txt node ( type regular contents 12345678 ) )
			entry ( name empty node ( type regular contents "" ) ) ) )
		entry ( name link node ( type symlink target a/b.txt ) )
		entry ( name run.sh node ( type regular executable "" contents #!/bin/sh; ) ) )`) {
		s = strings.ReplaceAll(strings.ReplaceAll(s, `""`, ""), ";", "\n")
		b.Write([]byte{byte(len(s)), 0, 0, 0, 0, 0, 0, 0})
		b.WriteString(s)
		b.Write(make([]byte, (8-len(s)%8)%8))
	}
	return b.Bytes()
}

func unpacked(t *testing.T, data []byte) (Hash, error) {
	t.Helper()
	file, err := scratch()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.Write(data); err != nil {
		t.Fatal(err)
	}
	tree, err := unpackFile(t.Context(), file, int64(len(data)))
	if err != nil {
		return Hash{}, err
	}
	defer tree.close()
	return tree.hash(t.Context())
}

func TestUnpack(t *testing.T) {
	want := Hash(sha256.Sum256(contentNAR()))
	plain := tarOf(t, content...)
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	archives := map[string][]byte{"tar": plain, "gzip": gz(plain), "zstd": z.EncodeAll(plain, nil), "zip": zipOf(t, content[1:]...)}
	for _, program := range []string{"xz", "bzip2"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Logf("LEFT OUT: %s, which is not installed here", program)
			continue
		}
		cmd := exec.Command(program, "-c")
		cmd.Stdin = bytes.NewReader(plain)
		if archives[program], err = cmd.Output(); err != nil {
			t.Fatal(err)
		}
	}
	for kind, data := range archives {
		if got, err := unpacked(t, data); err != nil || got != want {
			t.Errorf("%s: %s, want %s (%v)", kind, got.Form(SRI), want.Form(SRI), err)
		}
	}
	// A folder alone is what Nix says of an empty one.
	if got, err := unpacked(t, tarOf(t, member{"x/", "", 0o755, tar.TypeDir})); err != nil || got.Form(SRI) != "sha256-pQpattmS9VmO3ZIQUFn66az8GSmB4IvYhTTCFn6SUmo=" {
		t.Errorf("an empty folder: %s %v", got.Form(SRI), err)
	}
	linked, err := unpacked(t, tarOf(t, append(content[:3:3], member{"top/a/empty", "", 0o644, tar.TypeReg}, content[4])...))
	if err != nil || linked != want {
		t.Errorf("%v", err)
	}
}

func TestHostileArchives(t *testing.T) {
	file := func(name string) member { return member{name, "x", 0o644, tar.TypeReg} }
	for what, data := range map[string][]byte{
		"goes up":               tarOf(t, file("../x")),
		"goes up within":        tarOf(t, file("a/../../x")),
		"an absolute path":      tarOf(t, file("/etc/passwd")),
		"through a link":        tarOf(t, member{"a", "/etc", 0o777, tar.TypeSymlink}, file("a/passwd")),
		"through a file":        tarOf(t, file("a"), file("a/b")),
		"a file for a folder":   tarOf(t, file("a/b"), file("a")),
		"a link to nothing":     tarOf(t, member{"a", "", 0o777, tar.TypeSymlink}),
		"a hard link out":       tarOf(t, member{"a", "../../etc/passwd", 0o644, tar.TypeLink}),
		"a hard link to none":   tarOf(t, member{"a", "b", 0o644, tar.TypeLink}),
		"a hard link to folder": tarOf(t, file("b/x"), member{"a", "b", 0o644, tar.TypeLink}),
		"a device":              tarOf(t, member{"a", "", 0o644, tar.TypeChar}),
		"a pipe":                tarOf(t, member{"a", "", 0o644, tar.TypeFifo}),
		"a backslash":           tarOf(t, file(`..\x`)),
		"zip goes up":           zipOf(t, file("../x")),
		"zip absolute":          zipOf(t, file("/x")),
		"no archive":            []byte("<html>not found</html>"),
		"nothing":               nil,
		"cut off":               gz(tarOf(t, content...))[:60],
		"cut off zip":           zipOf(t, content[1:]...)[:100],
	} {
		if h, err := unpacked(t, data); err == nil {
			t.Errorf("%s: %s", what, h.Form(SRI))
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %q", what, err)
		}
	}
}

// TestBombs: what unpacks to much ends where it is too much, and not when it has been written.
func TestBombs(t *testing.T) {
	file, err := scratch()
	if err != nil {
		t.Fatal(err)
	}
	almost := &tree{root: &entry{below: map[string]*entry{}}, content: file, size: MaxUnpacked - 4}
	defer almost.close()
	if err := almost.file("x", false, strings.NewReader("12345")); err == nil {
		t.Error("more than the limit was taken")
	}
	r := &bounded{strings.NewReader("123456"), 5}
	if data, err := io.ReadAll(r); err == nil || string(data) != "12345" {
		t.Errorf("%q %v", data, err)
	}
	many := &tree{root: &entry{below: map[string]*entry{}}, content: file, entries: maxEntries - 1}
	if _, err := many.folder("a/b"); err == nil {
		t.Error("more entries than the limit were taken")
	}
	long := &tree{root: &entry{below: map[string]*entry{}}, content: file, names: maxNames - 4}
	if err := long.link("ab", "abc"); err == nil {
		t.Error("longer names than the limit were taken")
	}
	// A zip file is nothing but its directory, whose entries are all read before the first is looked at.
	data := zipOf(t, member{"a", "", 0o644, tar.TypeReg})
	begin, end := bytes.Index(data, []byte("PK\x01\x02")), bytes.Index(data, []byte("PK\x05\x06"))
	directory := bytes.Repeat(data[begin:end], maxDirectory/(end-begin)+1)
	tail := bytes.Clone(data[end:])
	binary.LittleEndian.PutUint32(tail[12:], uint32(len(directory)))
	if _, err := unpacked(t, slices.Concat(data[:begin], directory, tail)); err == nil || !strings.Contains(err.Error(), "directory") {
		t.Errorf("a directory of %d MiB: %v", len(directory)>>20, err)
	}
}

func FuzzUnpack(f *testing.F) {
	for _, data := range [][]byte{tarOf(f, content...), gz(tarOf(f, content...)), zipOf(f, content[1:]...)} {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if bytes.HasPrefix(data, []byte("\xfd7zXZ")) {
			return // another program's to read
		}
		_, _ = unpacked(t, data)
	})
}

// server serves files over TLS, and gives a fetcher that trusts it.
func server(t *testing.T, handler http.HandlerFunc) (*httptest.Server, *Fetcher) {
	t.Helper()
	s := httptest.NewTLSServer(handler)
	t.Cleanup(s.Close)
	roots := s.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	return s, &Fetcher{AllowPrivate: true, Roots: roots}
}

func TestHash(t *testing.T) {
	packed := gz(tarOf(t, content...))
	s, f := server(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/file":
			_, _ = w.Write(packed)
		case "/moved":
			http.Redirect(w, r, "/file", http.StatusFound)
		default:
			http.NotFound(w, r)
		}
	})
	flat := sha256.Sum256(packed)
	for _, path := range []string{"/file", "/moved", "/file#fragment"} {
		got, err := f.Hash(t.Context(), s.URL+path, false)
		if err != nil || hex.EncodeToString(got.Hash[:]) != hex.EncodeToString(flat[:]) || got.Bytes != int64(len(packed)) || got.URL != s.URL+"/file" {
			t.Errorf("%s: %+v %v", path, got, err)
		}
	}
	got, err := f.Hash(t.Context(), s.URL+"/file", true)
	if err != nil || got.Hash != Hash(sha256.Sum256(contentNAR())) {
		t.Errorf("unpacked: %+v %v", got, err)
	}
	if _, err := f.Hash(t.Context(), s.URL+"/none", false); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("what is not there: %v", err)
	}
	if _, err := (&Fetcher{AllowPrivate: true}).Hash(t.Context(), s.URL+"/file", false); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("from a server that nobody vouches for: %v", err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Hash(gone, s.URL+"/file", false); !errors.Is(err, context.Canceled) {
		t.Errorf("after the caller went: %v", err)
	}
}

func TestRedirects(t *testing.T) {
	inside, f := server(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "inside") })
	var to string
	s, _ := server(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusFound) })
	f.Roots.AddCert(s.Certificate())
	own := netip.MustParseAddrPort(s.Listener.Addr().String())
	f.AllowPrivate, f.permit = false, func(at netip.AddrPort) error { // the first server is in the internet, for once
		if at == own {
			return nil
		}
		return public(at.Addr())
	}
	for _, to = range []string{inside.URL, "http://example.org/", "https://user:pass@example.org/", "file:///etc/passwd", "https://169.254.169.254/latest/meta-data/", "https://[::1]/", "https://localhost/", "gopher://x", s.URL} {
		if got, err := f.Hash(t.Context(), s.URL, false); err == nil {
			t.Errorf("%s: %+v", to, got)
		}
	}
}

func TestTooLarge(t *testing.T) {
	s, f := server(t, func(w http.ResponseWriter, _ *http.Request) {
		zeros := make([]byte, 1<<20)
		for range MaxDownload>>20 + 2 {
			if _, err := w.Write(zeros); err != nil {
				return
			}
		}
	})
	if got, err := f.Hash(t.Context(), s.URL, false); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("%+v %v", got, err)
	}
}

// unreachable are addresses that are fetched from nowhere by default, whatever they are written as: the lines of
// testdata/hostile.txt, each quoted as in Go.
var unreachable = func() (all []string) {
	data, err := os.ReadFile("testdata/hostile.txt")
	if err != nil {
		panic(err)
	}
	for line := range strings.Lines(string(data)) {
		url, err := strconv.Unquote(strings.TrimSpace(line))
		if err != nil {
			panic(err)
		}
		all = append(all, url)
	}
	return all
}()

func TestUnreachable(t *testing.T) {
	f := &Fetcher{}
	for _, url := range unreachable {
		got, err := f.Hash(t.Context(), url, false)
		if err == nil {
			t.Errorf("%q: %+v", url, got)
		} else if strings.ContainsAny(err.Error(), "\n\x00") {
			t.Errorf("%q: %q", url, err)
		}
	}
	for _, a := range []string{"8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "1.1.1.1"} {
		if err := public(netip.MustParseAddr(a)); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
}

func TestScratchIsGone(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	if _, err := unpacked(t, tarOf(t, content...)); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("left: %v %v", fmt.Sprint(entries), err)
	}
}
