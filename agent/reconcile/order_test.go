package reconcile

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/nix-infra/nix-infra/protocol"
)

// forge signs what protocol's own signer would refuse to.
func (r *rig) forge(by *protocol.Signer, m *protocol.Manifest, target string) []byte {
	signed, err := by.Sign(protocol.Header{Version: protocol.Version, Kind: protocol.KindManifest, ID: m.Deployment, Action: protocol.Deploy,
		Target: target, NotBefore: time.Now().Unix()}, protocol.Encode(m))
	must(r.t, err)
	return protocol.Encode(signed)
}

func TestHostileManifests(t *testing.T) {
	with := func(m *protocol.Manifest, change func(*protocol.Manifest)) *protocol.Manifest {
		change(m)
		return m
	}
	for name, c := range map[string]struct {
		doc      func(r *rig) []byte
		reason   string
		reported bool
	}{
		"lower serial": {func(r *rig) []byte { return r.forge(r.signer, r.manifest(3, protocol.Switch, badUnit), nodeName) }, "not above 5", true},
		"other node": {func(r *rig) []byte {
			m := with(r.manifest(9, protocol.Switch, badUnit), func(m *protocol.Manifest) { m.Node, m.Attr = "n2", protocol.SystemAttr("n2") })
			return r.forge(r.signer, m, "n2")
		}, "signed for n2", false},
		"redirected": {func(r *rig) []byte {
			m := with(r.manifest(9, protocol.Switch, badUnit), func(m *protocol.Manifest) { m.Node, m.Attr = "n2", protocol.SystemAttr("n2") })
			return r.forge(r.signer, m, nodeName)
		}, "is for n2", false},
		"path out of the tree": {func(r *rig) []byte {
			m := with(r.manifest(9, protocol.Switch, badUnit), func(m *protocol.Manifest) { m.Files[0].Path = "../../root/.ssh/authorized_keys" })
			return r.forge(r.signer, m, nodeName)
		}, "not a clean path", false},
		"node's own file": {func(r *rig) []byte {
			return r.forge(r.signer, r.manifest(9, protocol.Switch, badUnit, "networking.nix"), nodeName)
		}, "belongs to the node", false},
		"over role": {func(r *rig) []byte {
			return r.forge(r.user("eve", protocol.Operator), r.manifest(9, protocol.Switch, badUnit), nodeName)
		}, "needs deployer", true},
		"forged": {func(r *rig) []byte {
			eve := r.user("eve", protocol.Operator)
			return r.forge(&protocol.Signer{User: r.signer.User, Key: eve.Key}, r.manifest(9, protocol.Switch, badUnit), nodeName)
		}, "not that of deployer", true},
		"garbage": {func(*rig) []byte { return []byte(`{"header":`) }, "malformed", false},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(0)
				defer l.stop()
				l.Look(r.publish(r.manifest(5, protocol.Switch, good)))
				l.settle(5)
				reports, asked := r.c.count(), r.asked()
				look := r.announce(99, c.doc(r))
				for range 5 {
					l.Look(look)
					time.Sleep(20 * time.Second)
				}
				s := l.State()
				if s.Serial != 5 || s.Phase != protocol.Confirmed || !strings.Contains(s.Reason, c.reason) {
					t.Errorf("state %+v, want the reason %q", s, c.reason)
				}
				r.runs(good, good)
				if n := r.asked() - asked; n != 1 {
					t.Errorf("a refused manifest was fetched %d times", n)
				}
				if got := r.c.count() - reports; got > 1 || (got == 1) != c.reported {
					t.Errorf("%d reports of it", got)
				}
				if c.reported && (r.c.last().Phase != protocol.FailedPhase || !strings.Contains(r.c.last().Reason, c.reason)) {
					t.Errorf("report %+v", r.c.last())
				}
				l.Look(r.publish(r.manifest(100, protocol.Switch, good)))
				if s := l.settle(100); s.Phase != protocol.Confirmed || s.Reason != "" {
					t.Errorf("what is right does not go on: %+v", s)
				}
			})
		})
	}
}

func (r *rig) asked() int {
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	return r.c.asked
}

// A manifest that was swapped for another one, good by itself, is not what was announced.
func TestSwappedManifest(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		announced := r.publish(r.manifest(1, protocol.Switch, good))
		other, err := r.signer.Manifest(r.manifest(2, protocol.Switch, badUnit))
		must(t, err)
		r.c.mu.Lock()
		r.c.manifests[announced.Digest] = other
		r.c.mu.Unlock()
		l.Look(announced)
		time.Sleep(20 * time.Second)
		if s := l.State(); s.Serial != 0 || !strings.Contains(s.Reason, "in place of") {
			t.Errorf("state %+v", s)
		}
		r.runs("old", "old")
	})
}

// A newer account JWT, which revokes the deployer, travels with the manifest's reply.
func TestRevokedDeployer(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		key, err := r.signer.Key.PublicKey()
		must(t, err)
		time.Sleep(time.Hour)
		public, err := r.keys.Publish(map[string]time.Time{key: time.Now()})
		must(t, err)
		r.c.account = public.AccountJWT
		l := r.start(0)
		defer l.stop()
		l.Look(r.publish(r.manifest(1, protocol.Switch, good)))
		time.Sleep(20 * time.Second)
		if s := l.State(); s.Serial != 0 || !strings.Contains(s.Reason, "revoked") {
			t.Errorf("state %+v", s)
		}
		// Another deployer's goes through.
		r.signer = r.user("other", protocol.Deployer)
		l.Look(r.publish(r.manifest(2, protocol.Switch, good)))
		if s := l.settle(2); s.Phase != protocol.Confirmed {
			t.Errorf("state %+v", s)
		}
	})
}

// A deployer that an account JWT makes good again, by whatever way it came, is not refused from memory.
func TestAccountChangedElsewhere(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		key, err := r.signer.Key.PublicKey()
		must(t, err)
		look := r.publish(r.manifest(1, protocol.Switch, good))
		time.Sleep(time.Hour)
		revoked, err := r.keys.Publish(map[string]time.Time{key: time.Now()})
		must(t, err)
		_, err = r.verifier.SetAccount(revoked.AccountJWT)
		must(t, err)
		l := r.start(0)
		defer l.stop()
		l.Look(look)
		time.Sleep(20 * time.Second)
		if s := l.State(); s.Serial != 0 || !strings.Contains(s.Reason, "revoked") {
			t.Fatalf("state %+v", s)
		}
		asked := r.asked()
		l.Look(look)
		time.Sleep(20 * time.Second)
		if r.asked() != asked {
			t.Error("a refused manifest was fetched again")
		}
		again, err := r.keys.Publish(nil)
		must(t, err)
		_, err = r.verifier.SetAccount(again.AccountJWT)
		must(t, err)
		l.Look(look)
		if s := l.settle(1); s.Phase != protocol.Confirmed {
			t.Errorf("state %+v", s)
		}
	})
}

func TestHostileBlobs(t *testing.T) {
	w, err := zstd.NewWriter(nil)
	must(t, err)
	bomb := w.EncodeAll(make([]byte, 3*protocol.MaxFileSize), nil)
	for name, c := range map[string]struct {
		data   []byte
		reason string
	}{
		"other content": {w.EncodeAll([]byte("evil"), nil), "other content"},
		"not zstd":      {[]byte("plain"), "decompressed"},
		"bomb":          {bomb, "decompressed"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(0)
				defer l.stop()
				look := r.publish(r.manifest(1, protocol.Switch, good))
				r.c.mu.Lock()
				r.c.blobs[protocol.Digest([]byte(good))] = c.data
				r.c.mu.Unlock()
				l.Look(look)
				if s := l.settle(1); s.Phase != protocol.FailedPhase || !strings.Contains(s.Reason, c.reason) {
					t.Errorf("state %+v", s)
				}
				r.runs("old", "old")
			})
		})
	}
}

func TestCacheIsBoundedAndChecked(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, ".half-written"), []byte("x"), 0o600))
	c, err := openCache(dir, 100)
	must(t, err)
	synctest.Test(t, func(t *testing.T) {
		blob := func(b byte) ([]byte, string) {
			data := []byte(strings.Repeat(string(b), 40))
			return data, protocol.Digest(data)
		}
		a, da := blob('a')
		b, db := blob('b')
		x, dx := blob('c')
		for _, p := range []struct {
			data   []byte
			digest string
		}{{a, da}, {b, db}} {
			must(t, c.put(p.digest, p.data, os.WriteFile))
			time.Sleep(time.Second)
		}
		if _, ok := c.get(da); !ok {
			t.Fatal("not there")
		}
		time.Sleep(time.Second)
		must(t, c.put(dx, x, os.WriteFile))
		if _, ok := c.get(db); ok {
			t.Error("the one that was not used for longest is still there")
		}
		if files := names(dir); len(files) != 2 || c.size != 80 {
			t.Errorf("%q, %d bytes", files, c.size)
		}
		must(t, os.WriteFile(filepath.Join(dir, da), []byte("damaged"), 0o600))
		if _, ok := c.get(da); ok {
			t.Error("a damaged blob was used")
		}
	})
}

// However gets and puts meet, the cache counts what is in its folder.
func TestCacheCountsWhatItHas(t *testing.T) {
	dir := t.TempDir()
	c, err := openCache(dir, 200)
	must(t, err)
	var all sync.WaitGroup
	for n := range 4 { // each has blobs of its own
		all.Go(func() {
			for i := range 500 {
				data := fmt.Appendf(nil, "%40d", 4*n+i%3)
				if _, ok := c.get(protocol.Digest(data)); ok {
					continue
				}
				if err := c.put(protocol.Digest(data), data, os.WriteFile); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if n := int64(40 * len(names(dir))); c.size != n || n > c.limit || len(c.files) != len(names(dir)) {
		t.Errorf("%d files of %d bytes are counted, and there are %d bytes", len(c.files), c.size, n)
	}
}

// Nothing is written through a symbolic link that leads out of the source tree.
func TestInstallStaysInside(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		outside := t.TempDir()
		must(t, os.Symlink(outside, filepath.Join(r.etc, "dir")))
		l := r.start(0)
		defer l.stop()
		l.Look(r.publish(r.manifest(1, protocol.Switch, good)))
		s := l.settle(1)
		if s.Phase != protocol.Confirmed || !strings.Contains(s.Reason, "not up to date") {
			t.Errorf("state %+v", s)
		}
		if files := names(outside); len(files) != 0 {
			t.Errorf("written outside: %q", files)
		}
	})
}
