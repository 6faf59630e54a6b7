package reconcile

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
)

const nodeName = "n1"

// rig is a node with a machine, a controller and a deployer who signs.
type rig struct {
	t         *testing.T
	m         *machine
	c         *controller
	keys      *protocol.FleetKeys
	public    *protocol.Public
	signer    *protocol.Signer
	verifier  *protocol.Verifier
	dir, etc  string
	key       nkeys.KeyPair // the node's curve key
	nextKey   nkeys.KeyPair // the one that is to replace it; nil: none
	loadsFrom string        // where units load secrets from
	builds    string        // where builds find theirs
	write     writer
	facts     func(context.Context) ([]byte, error)
	steps     []string
	records   []protocol.AuditRecord
	recording time.Duration // how long a record takes
}

// packer and fleetKeys are for all rigs, of which there are a thousand. They are made before any bubble is.
var (
	packer = func() *zstd.Encoder {
		w, err := zstd.NewWriter(nil, zstd.WithWindowSize(zstd.MinWindowSize))
		if err != nil {
			panic(err)
		}
		w.EncodeAll(nil, nil) // with that it makes its channel
		return w
	}()
	fleetKeys, fleetKeysErr = protocol.NewFleet("fleet")
)

func newRig(t *testing.T) *rig {
	t.Helper()
	must(t, fleetKeysErr)
	keys := fleetKeys
	public, err := keys.Publish(nil)
	must(t, err)
	r := &rig{t: t, m: newMachine(t), keys: keys, public: public, dir: filepath.Join(t.TempDir(), "state"), etc: t.TempDir(), write: quickly}
	r.key, err = nkeys.CreateCurveKeys()
	must(t, err)
	r.loadsFrom, r.builds = filepath.Join(t.TempDir(), "secrets"), inMemory(t)
	r.c = &controller{m: r.m, manifests: map[string][]byte{}, blobs: map[string][]byte{}}
	r.signer = r.user("deployer", protocol.Deployer)
	r.verifier, err = protocol.NewVerifier(public.Operator, public.AccountJWT)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(r.etc, "hardware-configuration.nix"), []byte("{ hardware }"), 0o644))
	must(t, os.WriteFile(filepath.Join(r.etc, "by-hand.nix"), []byte("mine"), 0o644))
	return r
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (r *rig) user(name string, role protocol.Role) *protocol.Signer {
	key, err := nkeys.CreateUser()
	must(r.t, err)
	pub, err := key.PublicKey()
	must(r.t, err)
	token, err := r.keys.Issue(name, role, pub, time.Time{})
	must(r.t, err)
	return &protocol.Signer{User: token, Key: key}
}

// manifest is one with a configuration of the given content, and some more files.
func (r *rig) manifest(serial uint64, mode protocol.Mode, content string, more ...string) *protocol.Manifest {
	if mode == protocol.DryActivate {
		serial = 0
	}
	m := &protocol.Manifest{Version: protocol.Version, Node: nodeName, Serial: serial, Deployment: fmt.Sprintf("d-%d-%s", serial, content),
		Created: time.Now(), Mode: mode, Attr: protocol.SystemAttr(nodeName), Timeout: 30, BuildTimeout: 60, Settle: 5}
	for path, data := range map[string]string{"dir/configuration.nix": content, "flake.nix": "{ }", "run.sh": "#!"} {
		m.Files = append(m.Files, r.file(path, data))
	}
	for _, path := range more {
		m.Files = append(m.Files, r.file(path, path))
	}
	slices.SortFunc(m.Files, func(a, b protocol.File) int {
		if a.Path < b.Path {
			return -1
		}
		return 1
	})
	return m
}

func (r *rig) file(path, data string) protocol.File {
	digest := protocol.Digest([]byte(data))
	packed := packer.EncodeAll([]byte(data), nil)
	r.c.mu.Lock()
	r.c.blobs[digest] = packed
	r.c.mu.Unlock()
	return protocol.File{Path: path, SHA256: digest, Size: int64(len(data)), Exec: path == "run.sh"}
}

// publish signs a manifest, gives it to the controller and makes the look that announces it.
func (r *rig) publish(m *protocol.Manifest) protocol.Look {
	doc, err := r.signer.Manifest(m)
	must(r.t, err)
	return r.announce(m.Serial, doc)
}

func (r *rig) announce(serial uint64, doc []byte) protocol.Look {
	digest := protocol.Digest(doc)
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	r.c.manifests[digest], r.c.newest = doc, digest
	return protocol.Look{Version: protocol.Version, Serial: serial, Digest: digest}
}

// quickly replaces a file as atomicfile does, without waiting for the disk: these tests cut no power.
func quickly(path string, data []byte, mode os.FileMode) error {
	if err := os.WriteFile(path+".new", data, mode); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// life is one run of the agent.
type life struct {
	*Engine
	cancel context.CancelFunc
	done   chan struct{}
}

// start starts the agent; with killAt it dies, as by kill -9, right after that many journal writes.
func (r *rig) start(killAt int) *life {
	r.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	dead := false
	n := 0
	e, err := New(Options{Dir: r.dir, Node: nodeName, Verifier: r.verifier, Upstream: r.c, Host: agent{r.m, &dead}, Log: slog.New(slog.DiscardHandler),
		Etc: r.etc, Roots: r.m.roots, Facts: r.facts, Key: r.key, Next: r.nextKey, Links: r.loadsFrom, Keys: r.builds, Audit: func(a protocol.AuditRecord) {
			time.Sleep(r.recording)
			r.m.mu.Lock()
			defer r.m.mu.Unlock()
			r.records = append(r.records, a)
		}, Step: func(step string) {
			r.m.mu.Lock()
			r.steps = append(r.steps, step)
			n++
			dies := n == killAt
			dead = dead || dies
			r.m.mu.Unlock()
			if dies {
				cancel()
				runtime.Goexit()
			}
		}})
	must(r.t, err)
	e.write = r.write
	l := &life{Engine: e, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(l.done)
		if err := e.Run(ctx); err != nil {
			r.t.Errorf("Run: %v", err)
		}
	}()
	return l
}

func (l *life) stop() {
	l.cancel()
	<-l.done
}

// settle waits until the deployment ended, or a good while.
func (l *life) settle(serial uint64) State {
	for range 600 {
		time.Sleep(500 * time.Millisecond)
		synctest.Wait()
		if s := l.State(); s.Serial == serial && s.Phase.Ended() {
			time.Sleep(time.Second)
			break
		}
	}
	return l.State()
}

// bubble runs a test in which time passes only when everything waits.
func bubble(t *testing.T, f func(t *testing.T, r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		f(t, r)
		r.m.mu.Lock()
		for _, u := range r.m.units {
			u.stop()
		}
		wrong := r.m.wrong
		effects := r.m.effects
		r.m.mu.Unlock()
		synctest.Wait()
		for _, w := range wrong {
			t.Errorf("illegal: %s (effects: %q)", w, effects)
		}
	})
}

// runs checks what runs, what the profile names and what would boot.
func (r *rig) runs(running, boots string) {
	r.t.Helper()
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	if behaviour(r.m.running) != running || behaviour(r.m.profile) != boots || behaviour(r.m.boots) != boots {
		r.t.Errorf("running %s, profile %s, boot default %s; want %s and %s (effects: %q)", behaviour(r.m.running), behaviour(r.m.profile),
			behaviour(r.m.boots), running, boots, r.m.effects)
	}
	if len(r.m.failed) != 1 {
		r.t.Errorf("units are left failed: %q (effects: %q)", r.m.failed, r.m.effects)
	}
	if r.m.timer != nil {
		r.t.Error("the revert timer is still armed")
	}
}

func (r *rig) inEtc(file string) string {
	data, err := os.ReadFile(filepath.Join(r.etc, file))
	if err != nil {
		return ""
	}
	return string(data)
}
