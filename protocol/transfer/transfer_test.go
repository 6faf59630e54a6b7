package transfer

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestReadWrite(t *testing.T) {
	var b bytes.Buffer
	hello := Hello{Version: Version, To: "/root/uploads"}
	if err := Write(&b, hello); err != nil {
		t.Fatal(err)
	}
	whole := bytes.Clone(b.Bytes())
	if got, err := Read[Hello](&b); err != nil || got != hello {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := Read[Hello](&b); !errors.Is(err, io.EOF) {
		t.Errorf("between two messages: %v", err)
	}
	for n := 1; n < len(whole); n++ {
		if _, err := Read[Hello](bytes.NewReader(whole[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut after %d bytes: %v", n, err)
		}
	}
	if err := Write(&b, make([]byte, MaxMessage)); err == nil {
		t.Error("a message that nobody reads was written")
	}
}

func TestHello(t *testing.T) {
	for _, h := range []Hello{{2, "/root"}, {1, ""}, {1, "root"}, {1, "/root/../etc"}, {1, "/root/"}, {1, "/a\nb"}} {
		if h.Validate() == nil {
			t.Errorf("%+v is valid", h)
		}
	}
}

// FuzzRead: whatever comes is a message within its limits or an error.
func FuzzRead(f *testing.F) {
	for _, m := range []any{Hello{1, "/root"}, Offer{[]File{{"a/b", 3, 0o644, protocol.Digest(nil)}}}, Plan{[]Step{{Offset: 4}}}, Result{Mismatch: true}} {
		var b bytes.Buffer
		if err := Write(&b, m); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		if o, err := Read[Offer](bytes.NewReader(data)); err == nil {
			if len(o.Files) == 0 || len(o.Files) > MaxFiles {
				t.Errorf("%d files", len(o.Files))
			}
			for _, file := range o.Files {
				if file.Path[0] == '/' || bytes.Contains([]byte("/"+file.Path+"/"), []byte("/../")) || file.Size < 0 {
					t.Errorf("%+v is valid", file)
				}
			}
		}
		_, _ = Read[Hello](bytes.NewReader(data))
		_, _ = Read[Plan](bytes.NewReader(data))
		_, _ = Read[Result](bytes.NewReader(data))
	})
}
