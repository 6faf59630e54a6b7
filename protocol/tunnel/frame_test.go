package tunnel

import (
	"bytes"
	"crypto/cipher"
	"reflect"
	"testing"

	"golang.org/x/crypto/chacha20poly1305"
)

func FuzzDecode(f *testing.F) {
	for _, sample := range []frame{{kind: kindData, offset: 7, data: []byte("x")}, {kind: kindFin, offset: 1 << 63}, {kind: kindAck, received: 1, limit: 2, gap: 3}, {kind: kindPing}, {kind: kindReset, reason: "why"}} {
		sealed := sample.seal(nil, zeroKey(f), 5)
		f.Add(sealed[0], unsealed(f, sealed))
	}
	f.Fuzz(func(t *testing.T, k byte, b []byte) {
		got, err := decode(kind(k), bytes.Clone(b))
		if err != nil {
			return
		}
		if len(got.data) > maxData || len(got.reason) > 3*maxReason {
			t.Fatalf("%d bytes, a reason of %d", len(got.data), len(got.reason))
		}
		again, counter, err := open(got.seal(nil, zeroKey(t), 9), zeroKey(t), 9)
		if got.kind == kindReset && err != nil {
			return // what was no UTF-8 became longer
		}
		if err != nil || counter != 9 || !reflect.DeepEqual(again, got) {
			t.Fatalf("%+v became %+v, %v", got, again, err)
		}
	})
}

func FuzzOpen(f *testing.F) {
	good := frame{kind: kindData, offset: 1, data: []byte("hello")}
	f.Add(good.seal(nil, zeroKey(f), 3))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _, _ = open(b, zeroKey(t), 0)
	})
}

// No kind is taken for JSON, and no counter is taken below the least.
func TestFrames(t *testing.T) {
	for _, k := range []kind{kindData, kindFin, kindAck, kindPing, kindReset} {
		if bytes.ContainsAny([]byte{byte(k)}, "{[\"-0123456789tfn \t\r\n") {
			t.Errorf("kind %d can begin a JSON document", k)
		}
	}
	sealed := (&frame{kind: kindPing}).seal(nil, zeroKey(t), 4)
	if _, _, err := open(bytes.Clone(sealed), zeroKey(t), 5); err == nil {
		t.Error("a counter that was there was taken")
	}
	if _, counter, err := open(bytes.Clone(sealed), zeroKey(t), 4); err != nil || counter != 4 {
		t.Errorf("%d, %v", counter, err)
	}
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 1
		if _, _, err := open(changed, zeroKey(t), 0); err == nil {
			t.Errorf("a frame was taken whose byte %d was changed", i)
		}
	}
}

func unsealed(t testing.TB, sealed []byte) []byte {
	plain, err := zeroKey(t).Open(nil, nonce(5), sealed[headSize:], sealed[:headSize])
	if err != nil {
		t.Fatal(err)
	}
	return plain
}

func zeroKey(t testing.TB) cipher.AEAD {
	key, err := chacha20poly1305.New(make([]byte, chacha20poly1305.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	return key
}
