package tunnel_test

import (
	"bytes"
	"crypto/ecdh"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// The broker may change what it carries: then the ends have different keys, and neither hears the other.
func TestAllThatIsAgreedIsBound(t *testing.T) {
	other, err := tunnel.NewKey()
	must(t, err)
	for name, change := range map[string]func(*tunnel.Agreed){
		"user":          func(a *tunnel.Agreed) { a.User = "eve" },
		"node":          func(a *tunnel.Agreed) { a.Node = "web2" },
		"id":            func(a *tunnel.Agreed) { a.ID = "id2" },
		"address":       func(a *tunnel.Agreed) { a.Order.To = "127.0.0.1:23" },
		"user's key":    func(a *tunnel.Agreed) { a.Order.Public = other.PublicKey().Bytes() },
		"user's window": func(a *tunnel.Agreed) { a.Order.Window++ },
		"node's key":    func(a *tunnel.Agreed) { a.Reply.Public = other.PublicKey().Bytes() },
		"node's window": func(a *tunnel.Agreed) { a.Reply.Window++ },
		"rule":          func(a *tunnel.Agreed) { a.Reply.Rule = "another" },
		"moved border":  func(a *tunnel.Agreed) { a.User, a.Node = a.User+"w", a.Node[1:] },
		"nothing":       nil,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				uk, nk := keys(t, change)
				user, node := (&way{takes: time.Millisecond}).openWith(t, uk, nk, 0)
				time.Sleep(5 * time.Second)
				for _, c := range []*tunnel.Conn{user, node} {
					select {
					case <-c.Heard():
						if change != nil {
							t.Error("heard")
						}
					default:
						if change == nil {
							t.Error("not heard")
						}
					}
					if _, _, dropped := c.Counts(); (dropped > 0) != (change != nil) {
						t.Errorf("%d frames were dropped", dropped)
					}
				}
			})
		})
	}
}

// Who has the node's place, but not its curve key, gets no keys that the user has.
func TestWrongNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		real, err := nkeys.CreateCurveKeys()
		must(t, err)
		xkey, err := real.PublicKey()
		must(t, err)
		uk, err := tunnel.NewKey()
		must(t, err)
		nk, err := tunnel.NewKey()
		must(t, err)
		a := tunnel.Agreed{User: "ann", Node: "web1", ID: "id", XKey: xkey, Order: protocol.TunnelOrder{Public: uk.PublicKey().Bytes()}, Reply: protocol.TunnelReply{Public: nk.PublicKey().Bytes()}}
		mine, err := tunnel.UserKeys(uk, a)
		must(t, err)
		false1, err := nkeys.CreateCurveKeys()
		must(t, err)
		theirs, err := tunnel.NodeKeys(nk, false1, a)
		must(t, err)
		user, _ := (&way{}).openWith(t, mine, theirs, 0)
		time.Sleep(5 * time.Second)
		select {
		case <-user.Heard():
			t.Error("the user's end heard a node that is another one")
		default:
		}
	})
}

func TestBadKeys(t *testing.T) {
	xkey, err := nkeys.CreateCurveKeys()
	must(t, err)
	public, err := xkey.PublicKey()
	must(t, err)
	seed, err := xkey.Seed()
	must(t, err)
	_, raw, err := nkeys.DecodeSeed(seed)
	must(t, err)
	same, err := ecdh.X25519().NewPrivateKey(raw)
	must(t, err)
	if shown, err := nkeys.Decode(nkeys.PrefixByteCurve, []byte(public)); err != nil || !bytes.Equal(shown, same.PublicKey().Bytes()) {
		t.Fatalf("a curve key of nkeys is no X25519 key: %v", err)
	}
	once, err := tunnel.NewKey()
	must(t, err)
	good := once.PublicKey().Bytes()
	for name, a := range map[string]tunnel.Agreed{
		"no curve key":    {XKey: "UABC", Reply: protocol.TunnelReply{Public: good}},
		"short key":       {XKey: public, Reply: protocol.TunnelReply{Public: good[1:]}},
		"low order point": {XKey: public, Reply: protocol.TunnelReply{Public: make([]byte, 32)}},
	} {
		if _, err := tunnel.UserKeys(once, a); err == nil {
			t.Errorf("%s: the user's end takes it", name)
		}
	}
	for name, key := range map[string][]byte{"none": nil, "short": good[1:], "low order point": make([]byte, 32)} {
		if _, err := tunnel.NodeKeys(once, xkey, tunnel.Agreed{Order: protocol.TunnelOrder{Public: key}}); err == nil {
			t.Errorf("%s: the node's end takes it", name)
		}
	}
}

// Frames that are changed, cut, repeated or somebody else's are dropped, and what they were goes through all the same.
func TestTampering(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &way{takes: time.Millisecond, kept: [][]byte{}}
		user, node := w.open(t, 0)
		go func() {
			for range 500 {
				time.Sleep(time.Millisecond)
				w.mu.Lock()
				if len(w.kept) == 0 {
					w.mu.Unlock()
					continue
				}
				b := bytes.Clone(w.kept[w.random.IntN(len(w.kept))])
				switch w.random.IntN(4) {
				case 0:
					b[w.random.IntN(len(b))] ^= 1 << w.random.IntN(8)
				case 1:
					b = b[:w.random.IntN(len(b))]
				case 2:
					b = append(b, 0)
				}
				w.mu.Unlock()
				node.Deliver(b)
			}
		}()
		exchange(t, user, node, noise(4<<20), noise(1<<20))
		time.Sleep(time.Second)
		if _, _, dropped := node.Counts(); dropped < 100 {
			t.Errorf("%d frames were dropped", dropped)
		}
	})
}

// All of a tunnel, played again to another one, to itself and to its other end.
func TestReplay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &way{takes: time.Millisecond, kept: [][]byte{}}
		user, node := w.open(t, 0)
		exchange(t, user, node, noise(1<<20), nil)
		w2 := &way{takes: time.Millisecond}
		user2, node2 := w2.open(t, 0)
		time.Sleep(time.Second)
		before := w.carried()
		for _, f := range w.kept {
			for _, c := range []*tunnel.Conn{user, node, user2, node2} {
				c.Deliver(bytes.Clone(f))
			}
		}
		if n := w.carried() - before; n != 0 {
			t.Errorf("the ends said %d frames about it", n)
		}
		exchange(t, user2, node2, noise(100), noise(200))
		if _, received, _ := node.Counts(); received != 1<<20 {
			t.Errorf("%d bytes were received", received)
		}
	})
}

// A broker that leaves out the end of a stream, or all of it from some point on, makes an error of it, and no end.
func TestTruncation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &way{takes: time.Millisecond}
		user, node := w.open(t, 0)
		_, err := user.Write(noise(1000))
		must(t, err)
		time.Sleep(time.Second)
		w.cut(true)
		must(t, user.CloseWrite())
		if _, err := io.ReadAll(node); !errors.Is(err, tunnel.ErrGone) {
			t.Errorf("read: %v", err)
		}
	})
}
