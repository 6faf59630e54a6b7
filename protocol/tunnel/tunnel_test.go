package tunnel_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// way carries frames between two ends as badly as it is told to.
type way struct {
	lost, twice, late float64       // parts of the frames, of 1
	takes             time.Duration // from one end to the other
	rate              int           // bytes a second, 0: any number

	mu     sync.Mutex
	random *rand.Rand
	broken bool
	kept   [][]byte // what it carried, from the user to the node
	count  int
	ctx    context.Context
	under  sync.WaitGroup
}

type arrival struct {
	frame []byte
	at    time.Time
}

// open makes both ends of a tunnel on the way.
func (w *way) open(t testing.TB, window int64) (user, node *tunnel.Conn) {
	uk, nk := keys(t, nil)
	return w.openWith(t, uk, nk, window)
}

func (w *way) openWith(t testing.TB, uk, nk tunnel.Keys, window int64) (user, node *tunnel.Conn) {
	w.random = rand.New(rand.NewPCG(1, 2))
	var cancel context.CancelFunc
	w.ctx, cancel = context.WithCancel(context.Background())
	up, down := make(chan arrival, 1<<14), make(chan arrival, 1<<14)
	user = tunnel.New(tunnel.Options{Keys: uk, Window: window, PeerWindow: window, Send: w.sender(up, true), Local: "ann", Remote: "web1"})
	node = tunnel.New(tunnel.Options{Keys: nk, Window: window, PeerWindow: window, Send: w.sender(down, false), Local: "web1", Remote: "ann"})
	w.under.Go(func() { w.carry(up, node) })
	w.under.Go(func() { w.carry(down, user) })
	t.Cleanup(func() {
		user.Reset("the test is over")
		node.Reset("the test is over")
		<-user.Done()
		<-node.Done()
		cancel()
		w.under.Wait()
	})
	return user, node
}

func (w *way) sender(to chan arrival, keep bool) func([]byte) error {
	var free time.Time // when the last frame has left, on a way of some rate
	return func(frame []byte) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.broken {
			return errors.New("there is no way")
		}
		w.count++
		if keep && w.kept != nil {
			w.kept = append(w.kept, bytes.Clone(frame))
		}
		if w.random.Float64() < w.lost {
			return nil
		}
		now := time.Now()
		at := now.Add(w.takes)
		if w.rate > 0 {
			if free.Before(now) {
				free = now
			}
			free = free.Add(time.Duration(len(frame)) * time.Second / time.Duration(w.rate))
			at = free.Add(w.takes)
		}
		copies := 1
		if w.random.Float64() < w.twice {
			copies = 2
		}
		for range copies {
			a := arrival{bytes.Clone(frame), at}
			if w.random.Float64() < w.late {
				w.under.Go(func() {
					time.Sleep(3 * w.takes)
					to <- a
				})
				continue
			}
			to <- a
		}
		return nil
	}
}

func (w *way) carry(from chan arrival, to *tunnel.Conn) {
	for {
		select {
		case a := <-from:
			time.Sleep(time.Until(a.at))
			to.Deliver(a.frame)
		case <-w.ctx.Done():
			return
		}
	}
}

func (w *way) cut(broken bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.broken = broken
}

func (w *way) carried() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.count
}

// keys agrees on keys; change makes what the node believes another thing than what the user believes.
func keys(t testing.TB, change func(*tunnel.Agreed)) (user, node tunnel.Keys) {
	t.Helper()
	xkey, err := nkeys.CreateCurveKeys()
	must(t, err)
	public, err := xkey.PublicKey()
	must(t, err)
	uk, err := tunnel.NewKey()
	must(t, err)
	nk, err := tunnel.NewKey()
	must(t, err)
	a := tunnel.Agreed{User: "ann", Node: "web1", ID: "id", XKey: public,
		Order: protocol.TunnelOrder{To: "127.0.0.1:22", Public: uk.PublicKey().Bytes(), Window: 1 << 20},
		Reply: protocol.TunnelReply{Public: nk.PublicKey().Bytes(), Window: 1 << 20, Rule: "default"}}
	user, err = tunnel.UserKeys(uk, a)
	must(t, err)
	if change != nil {
		change(&a)
	}
	node, err = tunnel.NodeKeys(nk, xkey, a)
	must(t, err)
	return user, node
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func noise(size int) []byte {
	b := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// exchange sends data both ways at once and checks that each end got what the other one sent, and its end.
func exchange(t *testing.T, user, node *tunnel.Conn, up, down []byte) {
	t.Helper()
	var all sync.WaitGroup
	one := func(name string, c *tunnel.Conn, send, expect []byte) {
		all.Go(func() {
			if _, err := io.Copy(c, bytes.NewReader(send)); err != nil {
				t.Errorf("%s: write: %v", name, err)
			}
			if err := c.CloseWrite(); err != nil {
				t.Errorf("%s: close write: %v", name, err)
			}
		})
		all.Go(func() {
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, expect) {
				t.Errorf("%s: read %d bytes of %d, equal %t, error %v", name, len(got), len(expect), bytes.Equal(got, expect), err)
			}
		})
	}
	one("user", user, up, down)
	one("node", node, down, up)
	all.Wait()
	<-user.Done()
	<-node.Done()
	if user.Err() != nil || node.Err() != nil {
		t.Errorf("ended with %v and %v", user.Err(), node.Err())
	}
	if sent, received, _ := user.Counts(); sent != int64(len(up)) || received != int64(len(down)) {
		t.Errorf("the user's end counted %d sent and %d received, of %d and %d", sent, received, len(up), len(down))
	}
}

func TestBothWays(t *testing.T) {
	for name, w := range map[string]*way{
		"good":       {},
		"far":        {takes: 150 * time.Millisecond},
		"lossy":      {takes: 5 * time.Millisecond, lost: 0.1},
		"repeating":  {takes: 5 * time.Millisecond, twice: 0.3},
		"reordering": {takes: 5 * time.Millisecond, late: 0.2},
		"all bad":    {takes: 20 * time.Millisecond, lost: 0.1, twice: 0.1, late: 0.1},
		"slow":       {takes: 20 * time.Millisecond, rate: 200_000},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				user, node := w.open(t, 0)
				exchange(t, user, node, noise(3<<20+17), noise(1<<20+1))
			})
		})
	}
}

func TestEmpty(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		user, node := (&way{}).open(t, 0)
		exchange(t, user, node, nil, nil)
	})
}

// One direction ends, the other one goes on.
func TestHalfClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		user, node := (&way{takes: time.Millisecond}).open(t, 0)
		_, err := user.Write([]byte("question"))
		must(t, err)
		must(t, user.CloseWrite())
		got, err := io.ReadAll(node)
		must(t, err)
		if string(got) != "question" {
			t.Fatalf("the node read %q", got)
		}
		if _, err := user.Write([]byte("more")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("a write after the end: %v", err)
		}
		time.Sleep(time.Hour)
		_, err = node.Write([]byte("answer"))
		must(t, err)
		must(t, node.Close())
		if got, err := io.ReadAll(user); err != nil || string(got) != "answer" {
			t.Fatalf("the user read %q, %v", got, err)
		}
		must(t, user.Close())
		<-user.Done()
		<-node.Done()
		if user.Err() != nil || node.Err() != nil {
			t.Errorf("ended with %v and %v", user.Err(), node.Err())
		}
	})
}

// A writer waits for a reader, and neither end keeps more than the window.
func TestBackPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const window = 256 << 10
		w := &way{takes: time.Millisecond, lost: 0.05}
		user, node := w.open(t, window)
		data := noise(4 << 20)
		written := make(chan error, 1)
		go func() {
			_, err := user.Write(data)
			written <- err
		}()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		select {
		case err := <-written:
			t.Fatalf("4 MiB were written although nobody reads: %v", err)
		default:
		}
		if _, received, _ := node.Counts(); received == 0 || received > window {
			t.Fatalf("%d bytes were taken in, the window is %d", received, window)
		}
		idle := w.carried()
		time.Sleep(10 * time.Minute)
		if n := w.carried() - idle; n > 150 {
			t.Errorf("%d frames in 10 minutes of waiting", n)
		}
		got := make([]byte, len(data))
		_, err := io.ReadFull(node, got)
		must(t, err)
		must(t, <-written)
		if !bytes.Equal(got, data) {
			t.Error("other bytes")
		}
	})
}

// On a slow way hardly anything queues up: a word gets through soon while a file is sent.
func TestSlowWayStaysShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &way{takes: 10 * time.Millisecond, rate: 500_000}
		user, node := w.open(t, 0)
		go func() { _, _ = io.Copy(io.Discard, node) }()
		go func() { _, _ = io.Copy(user, bytes.NewReader(noise(60<<20))) }()
		time.Sleep(70 * time.Second)
		for range 10 {
			time.Sleep(time.Second)
			before, _, _ := user.Counts()
			_, arrived, _ := node.Counts()
			if under := arrived - before; under > 400_000 {
				t.Errorf("%d bytes were under way", under)
			}
		}
		if _, arrived, _ := node.Counts(); arrived < 25_000_000 {
			t.Errorf("%d bytes in 80 s at 500 kB/s", arrived)
		}
	})
}

func TestIdleCostsAKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &way{takes: time.Millisecond}
		user, node := w.open(t, 0)
		time.Sleep(time.Minute)
		before := w.carried()
		time.Sleep(10 * time.Minute)
		if n := w.carried() - before; n < 30 || n > 4*30 {
			t.Errorf("%d frames in 10 idle minutes", n)
		}
		exchange(t, user, node, noise(100), noise(100))
	})
}

func TestSurvivesAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &way{takes: 5 * time.Millisecond, rate: 1_000_000}
		user, node := w.open(t, 0)
		done := make(chan struct{})
		var cutting sync.WaitGroup
		cutting.Go(func() {
			for broken := true; ; broken = !broken {
				select {
				case <-time.After(map[bool]time.Duration{true: 2 * time.Second, false: 40 * time.Second}[broken]):
					w.cut(broken)
				case <-done:
					return
				}
			}
		})
		defer cutting.Wait()
		defer close(done)
		began := time.Now()
		defer func() {
			if took := time.Since(began); took < 80*time.Second {
				t.Errorf("it took %v: there were no two outages", took)
			}
		}()
		exchange(t, user, node, noise(4<<20), noise(4<<20))
	})
}

func TestGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &way{}
		user, node := w.open(t, 0)
		_, err := node.Write([]byte("the last word"))
		must(t, err)
		time.Sleep(time.Second)
		w.cut(true)
		began := time.Now()
		got, err := io.ReadAll(user)
		if !errors.Is(err, tunnel.ErrGone) || string(got) != "the last word" {
			t.Errorf("read %q, %v", got, err)
		}
		if took := time.Since(began); took < 55*time.Second || took > 65*time.Second {
			t.Errorf("given up after %v", took)
		}
		if _, err := user.Write([]byte("x")); !errors.Is(err, tunnel.ErrGone) {
			t.Errorf("write: %v", err)
		}
	})
}

func TestReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &way{takes: time.Millisecond}
		user, node := w.open(t, 0)
		_, err := node.Write([]byte("half a wo"))
		must(t, err)
		time.Sleep(time.Second)
		node.Reset("the credentials of ann were revoked")
		got, err := io.ReadAll(user)
		var reset *tunnel.ResetError
		if !errors.As(err, &reset) || reset.Reason != "the credentials of ann were revoked" || string(got) != "half a wo" {
			t.Errorf("read %q, %v", got, err)
		}
		if _, err := node.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("read at the end that broke it off: %v", err)
		}
		<-user.Done()
		<-node.Done()
	})
}

// An end that missed the reset is told again when it speaks.
func TestResetIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &way{takes: time.Millisecond}
		user, node := w.open(t, 0)
		time.Sleep(time.Second)
		w.cut(true)
		node.Reset("enough")
		<-node.Done()
		w.cut(false)
		_, err := user.Write([]byte("are you there"))
		must(t, err)
		began := time.Now()
		<-user.Done()
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("it took %v to hear of it", took)
		}
	})
}

// Who closes while the other end still speaks lets it know that nobody read that.
func TestCloseWhileSpokenTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		user, node := (&way{takes: time.Millisecond}).open(t, 0)
		must(t, user.Close())
		if _, err := user.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read: %v", err)
		}
		if _, err := user.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write: %v", err)
		}
		var err error
		for range 100 {
			if _, err = node.Write([]byte("is anybody there")); err != nil {
				break
			}
			time.Sleep(time.Second)
		}
		if err == nil || !strings.Contains(err.Error(), "nobody reads") {
			t.Errorf("the node's end: %v", err)
		}
	})
}

func TestDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		user, node := (&way{takes: time.Millisecond}).open(t, tunnel.MinWindow)
		must(t, user.SetDeadline(time.Now().Add(time.Second)))
		began := time.Now()
		if _, err := user.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("read: %v after %v", err, time.Since(began))
		}
		must(t, user.SetDeadline(time.Now().Add(time.Second)))
		n, err := user.Write(make([]byte, 1<<20))
		if !errors.Is(err, os.ErrDeadlineExceeded) || n == 0 || n > 2*tunnel.MinWindow {
			t.Errorf("write: %d, %v", n, err)
		}
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%v is no timeout", err)
		}
		must(t, user.SetDeadline(time.Time{}))
		_, err = io.ReadFull(node, make([]byte, n))
		must(t, err)
		_, err = user.Write(make([]byte, tunnel.MinWindow))
		must(t, err)
	})
}
