package agent_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/health"
	"github.com/nix-infra/nix-infra/agent/heartbeat"
	"github.com/nix-infra/nix-infra/agent/link"
	"github.com/nix-infra/nix-infra/agent/reconcile"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

const node = "web-1"

// host is a machine on which nothing can be built, and which remembers what was tried.
type host struct {
	reconcile.Host // nil: there are no secrets here

	mu          sync.Mutex
	built       int
	acted       []string
	generations []nix.Generation // of the profile, the newest first
	collecting  chan struct{}    // where there is one, collecting garbage waits for it
	exit        int              // status with which switch-to-configuration ends
}

func (h *host) did(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.acted = append(h.acted, what)
}

// seen is what was done, and taken what was done since it was taken last.
func (h *host) seen() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.acted)
}

func (h *host) taken() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	acted := h.acted
	h.acted = nil
	return acted
}

func systemPath(name string) string { return "/nix/store/" + strings.Repeat("0", 32) + "-" + name }

func (h *host) Observe(context.Context) (reconcile.Observation, error) {
	return reconcile.Observation{Running: systemPath("old"), Booted: systemPath("booted"), Profile: systemPath("old"), BootID: "boot-1", Uptime: time.Hour, Generation: 9}, nil
}

func (h *host) Build(context.Context, reconcile.Build) (string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.built++
	return "", errors.New("nothing can be built here")
}
func (h *host) Substitute(context.Context, reconcile.Substitution) error {
	return errors.New("there is no cache here")
}
func (h *host) Generations(context.Context) ([]nix.Generation, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.generations), nil
}
func (h *host) DeleteGenerations(_ context.Context, numbers []int) error {
	h.did(fmt.Sprint("delete ", numbers))
	h.mu.Lock()
	defer h.mu.Unlock()
	h.generations = slices.DeleteFunc(h.generations, func(g nix.Generation) bool { return slices.Contains(numbers, g.Number) })
	return nil
}
func (h *host) CollectGarbage(ctx context.Context) (int, int64, error) {
	h.did("collect")
	if h.collecting != nil {
		select {
		case <-h.collecting:
		case <-ctx.Done():
			return 0, 0, ctx.Err()
		}
	}
	return 12, 3456, nil
}
func (h *host) ClosureInfo(context.Context, string) ([]nix.PathInfo, error) { return nil, nil }
func (h *host) Declared(string) ([]health.Declaration, error)               { return nil, nil }
func (h *host) UnitState(context.Context, string) (string, error)           { return "active", nil }
func (h *host) Check(string) error                                          { return nil }
func (h *host) SetProfile(context.Context, string) error                    { h.did("profile"); return nil }
func (h *host) Arm(context.Context, reconcile.Revert) error                 { h.did("arm"); return nil }
func (h *host) Disarm(context.Context, reconcile.Revert) (bool, error)      { return false, nil }
func (h *host) Run(_ context.Context, j reconcile.Job) (reconcile.Outcome, error) {
	h.did("run " + j.Unit)
	h.mu.Lock()
	defer h.mu.Unlock()
	return reconcile.Outcome{Found: true, Exit: h.exit}, nil
}
func (h *host) Journal(context.Context, string, int) (string, error) { return "", nil }
func (h *host) Renew(context.Context) (bool, error)                  { return false, nil }
func (h *host) Reboot(context.Context) error                         { h.did("reboot"); return nil }

// running is an agent in a test.
type running struct {
	t      *testing.T
	host   *host
	etc    string // its source tree
	cancel context.CancelFunc
	done   chan error

	mu   sync.Mutex
	told []string
}

func start(t *testing.T, dir string, change ...func(*agent.Options)) *running {
	t.Helper()
	r := &running{t: t, host: &host{}, etc: t.TempDir(), done: make(chan error, 1)}
	var ctx context.Context
	ctx, r.cancel = context.WithCancel(context.Background())
	o := agent.Options{Dir: dir, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Host: r.host, Facts: &heartbeat.Host{},
		Interval: time.Second, Watchdog: time.Second,
		Backoff: link.Backoff{Base: 20 * time.Millisecond, Jitter: 10 * time.Millisecond, Cap: 40 * time.Millisecond},
		Notify:  func(s string) { r.mu.Lock(); r.told = append(r.told, s); r.mu.Unlock() },
		Deploy: func(o *reconcile.Options) {
			o.Etc, o.Roots, o.Links = r.etc, filepath.Join(dir, "roots"), filepath.Join(dir, "secrets")
		}}
	for _, c := range change {
		c(&o)
	}
	go func() { r.done <- agent.Run(ctx, o) }()
	t.Cleanup(r.stop)
	return r
}

// stop ends the agent as SIGTERM does.
func (r *running) stop() {
	r.t.Helper()
	if r.cancel == nil {
		return
	}
	r.cancel()
	r.cancel = nil
	select {
	case err := <-r.done:
		if err != nil {
			r.t.Errorf("Run: %v", err)
		}
	case <-time.After(30 * time.Second): // it takes 3 s at most where it gets the CPU that it wants
		r.t.Error("the agent does not end within 30 s")
	}
}

func (r *running) wasTold(prefix string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.told, func(s string) bool { return strings.HasPrefix(s, prefix) })
}

// side is the controllers' side: what it heard, and what it says.
type side struct {
	nc      *nats.Conn
	mu      sync.Mutex
	beats   []protocol.Beat
	reports []protocol.Report
	doc     []byte
	blobs   map[string][]byte
}

func control(t *testing.T, f *testfleet.Fleet) *side {
	t.Helper()
	s := &side{nc: f.Controller(), blobs: map[string][]byte{}}
	js := s.jetStream(t)
	if _, err := js.AddStream(&nats.StreamConfig{Name: "audit", Subjects: protocol.AuditSubjects}); err != nil {
		t.Fatal(err)
	}
	f.Serve(s.nc, protocol.UpBeat, func(_ string, data []byte) (any, error) {
		b, err := protocol.Decode[protocol.Beat](data)
		if err != nil {
			t.Errorf("beat %s: %v", data, err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.beats = append(s.beats, b)
		return nil, nil
	})
	f.Serve(s.nc, protocol.UpManifest, func(string, []byte) (any, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return protocol.ManifestReply{Digest: protocol.Digest(s.doc), Manifest: s.doc}, nil
	})
	f.Serve(s.nc, protocol.UpBlob, func(_ string, data []byte) (any, error) {
		q, err := protocol.Decode[protocol.BlobQuery](data)
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		b, ok := s.blobs[q.Blob]
		if !ok {
			return nil, protocol.Refuse(protocol.Unknown, "no such blob")
		}
		return protocol.BlobReply{Size: int64(len(b)), Data: b[q.Offset:]}, nil
	})
	f.Serve(s.nc, protocol.UpReport, func(_ string, data []byte) (any, error) {
		r, err := protocol.Decode[protocol.Report](data)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.reports = append(s.reports, r)
		return nil, err
	})
	return s
}

func (s *side) jetStream(t *testing.T) nats.JetStreamContext {
	t.Helper()
	js, err := s.nc.JetStream(nats.MaxWait(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func (s *side) lastBeat() (protocol.Beat, int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.beats) == 0 {
		return protocol.Beat{}, 0
	}
	return s.beats[len(s.beats)-1], len(s.beats)
}

// audited are the records in the stream.
func (s *side) audited(t *testing.T) []protocol.AuditRecord {
	t.Helper()
	js := s.jetStream(t)
	info, err := js.StreamInfo("audit")
	if err != nil {
		t.Fatal(err)
	}
	var all []protocol.AuditRecord
	for seq := uint64(1); seq <= info.State.LastSeq; seq++ {
		m, err := js.GetMsg("audit", seq)
		if err != nil {
			t.Fatal(err)
		}
		for _, data := range protocol.SplitRecords(m.Data) {
			r, err := protocol.Decode[protocol.AuditRecord](data)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, r)
		}
	}
	return all
}

func (s *side) look(t *testing.T, doc []byte, serial uint64, account string) {
	t.Helper()
	s.mu.Lock()
	s.doc = doc
	s.mu.Unlock()
	l := protocol.Look{Version: protocol.Version, Serial: serial, Account: account}
	if doc != nil {
		l.Digest = protocol.Digest(doc)
	}
	if err := s.nc.Publish(protocol.LookSubject(node), protocol.Encode(l)); err != nil {
		t.Fatal(err)
	}
}

func enrolled(t *testing.T, f *testfleet.Fleet) string {
	t.Helper()
	dir := t.TempDir()
	f.EnrolAt(agent.Home(dir), node)
	return dir
}

// ask asks the node and gives its answer.
func ask(t *testing.T, f *testfleet.Fleet, who *protocol.Signer, name string, a protocol.Action, payload any) protocol.Reply {
	t.Helper()
	nc := f.Connect(who, "")
	defer nc.Close()
	signed, id, err := who.Request(a, node, payload, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	sub, err := nc.SubscribeSync(protocol.ReplySubject(name, id, node))
	if err != nil {
		t.Fatal(err)
	}
	var m *nats.Msg
	testfleet.Eventually(t, "the node listens", func() bool { // a beat that was heard may have been the last one of the agent before
		if err := nc.PublishRequest(protocol.RequestSubject(node, a), protocol.ReplySubject(name, id, node), protocol.Encode(signed)); err != nil {
			t.Fatal(err)
		}
		m, err = sub.NextMsg(30 * time.Second)
		return !errors.Is(err, nats.ErrNoResponders)
	})
	if err != nil {
		t.Fatalf("%s: %v", a, err)
	}
	r, err := protocol.Decode[protocol.Reply](m.Data)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestBeatsAnswersAndStops(t *testing.T) {
	f := testfleet.New(t)
	s := control(t, f)
	dir := enrolled(t, f)
	r := start(t, dir)
	testfleet.Eventually(t, "beats", func() bool { _, n := s.lastBeat(); return n >= 2 })
	b, _ := s.lastBeat()
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	switch {
	case b.Version != protocol.Version || b.Interval != 1 || b.Agent != protocol.Build():
		t.Errorf("beat %+v", b)
	case b.Kernel != strings.TrimSpace(string(release)) || len(b.BootID) != 36:
		t.Errorf("kernel %q, boot %q", b.Kernel, b.BootID)
	case b.IPv4 != "127.0.0.1" || b.Account == 0 || time.Since(time.Unix(b.Account, 0)) > time.Minute:
		t.Errorf("address %q, account %d", b.IPv4, b.Account)
	case b.Vitals.Uptime <= 0 || b.Vitals.MemTotal < 64<<20 || b.Vitals.MemAvailable <= 0 || b.Vitals.MemAvailable >= b.Vitals.MemTotal:
		t.Errorf("vitals %+v", b.Vitals)
	}
	ann := f.User("ann", protocol.Deployer)
	var pong protocol.Pong
	if reply := ask(t, f, ann, "ann", protocol.Ping, nil); json.Unmarshal(reply.Body, &pong) != nil || pong.Agent != protocol.Build() || time.Since(pong.Time) > time.Minute {
		t.Errorf("ping: %+v", reply)
	}
	var facts protocol.Beat
	if reply := ask(t, f, ann, "ann", protocol.Facts, nil); json.Unmarshal(reply.Body, &facts) != nil || facts.BootID != b.BootID {
		t.Errorf("facts: %+v", reply)
	}
	if reply := ask(t, f, ann, "ann", protocol.Release, protocol.NameRequest{Name: "/nix/store/none"}); reply.Refused == nil || reply.Refused.Code != protocol.Unknown {
		t.Errorf("release: %+v", reply)
	}
	if reply := ask(t, f, ann, "ann", protocol.Release, nil); reply.Refused == nil || reply.Refused.Code != protocol.Malformed {
		t.Errorf("release without a payload: %+v", reply)
	}
	testfleet.Eventually(t, "the audit stream", func() bool { return len(s.audited(t)) == 8 })
	for i, a := range s.audited(t) {
		if a.Seq != uint64(i+1) || a.At != node || a.User != "ann" || (i%2 == 0) != (a.Outcome == "") {
			t.Errorf("record %d: %+v", i, a)
		}
	}
	if _, err := agent.ReadStatus(dir); err != nil {
		t.Fatal(err)
	} else if st, _ := agent.ReadStatus(dir); !st.Running || st.Node != node || st.Operator != f.Public.Operator {
		t.Errorf("status %+v", st)
	}
	testfleet.Eventually(t, "the watchdog is fed", func() bool { return r.wasTold("WATCHDOG=1") && r.wasTold("STATUS=connected to tls://") })
	r.stop()
	if !r.wasTold("STOPPING=1") {
		t.Errorf("told %v", r.told)
	}
	if st, err := agent.ReadStatus(dir); err != nil || st.Running {
		t.Errorf("status after the end: %+v, %v", st, err)
	}
}

func TestReadyWithoutNetwork(t *testing.T) {
	f := testfleet.New(t)
	dir := enrolled(t, f)
	f.Stop()
	r := start(t, dir)
	testfleet.Eventually(t, "READY=1", func() bool { return r.wasTold("READY=1") && r.wasTold("STATUS=no controller reached") })
}

func TestNotEnrolledSaysWhatToDo(t *testing.T) {
	err := agent.Run(t.Context(), agent.Options{Dir: t.TempDir(), Log: slog.Default()})
	if !errors.Is(err, machine.ErrNotEnrolled) || !strings.Contains(err.Error(), "nix-infra-agent request --name") || strings.Contains(err.Error(), "\n") {
		t.Fatal(err)
	}
}

func TestOneAgentPerFolder(t *testing.T) {
	f := testfleet.New(t)
	dir := enrolled(t, f)
	r := start(t, dir)
	testfleet.Eventually(t, "READY=1", func() bool { return r.wasTold("READY=1") })
	err := agent.Run(t.Context(), agent.Options{Dir: dir, Log: slog.Default(), Host: &host{}, Facts: &heartbeat.Host{}})
	if err == nil || !strings.Contains(err.Error(), "another agent runs") {
		t.Fatal(err)
	}
}

// TestRevocationReachesTheNode: by a look, at once, for good, and only from the operator.
func TestRevocationReachesTheNode(t *testing.T) {
	f := testfleet.New(t)
	s := control(t, f)
	dir := enrolled(t, f)
	r := start(t, dir)
	testfleet.Eventually(t, "a beat", func() bool { _, n := s.lastBeat(); return n > 0 })
	eve := f.User("eve", protocol.Admin)
	key, err := eve.Key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	if reply := ask(t, f, eve, "eve", protocol.Ping, nil); reply.Refused != nil {
		t.Fatal(reply.Refused)
	}
	forger, err := protocol.NewFleet("forger")
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := forger.Publish(nil)
	if err != nil {
		t.Fatal(err)
	}
	s.look(t, nil, 0, theirs.AccountJWT)
	first, _ := s.lastBeat()
	time.Sleep(time.Until(time.Unix(first.Account, 0).Add(1100 * time.Millisecond))) // account JWTs are told apart by the second
	revoked, err := f.Keys.Publish(map[string]time.Time{key: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	s.look(t, nil, 0, revoked.AccountJWT) // the broker is not told: the node has to refuse
	testfleet.Eventually(t, "a beat with the newer account", func() bool { b, _ := s.lastBeat(); return b.Account > first.Account })
	for range 2 {
		if reply := ask(t, f, eve, "eve", protocol.Ping, nil); reply.Refused == nil || reply.Refused.Code != protocol.Revoked {
			t.Fatalf("revoked, and answered %+v", reply)
		}
		r.stop()
		_, before := s.lastBeat()
		r = start(t, dir) // the restart does not forget
		testfleet.Eventually(t, "a beat", func() bool { _, n := s.lastBeat(); return n > before })
	}
}

// TestManyInOneProcess keeps an agent as small as a swarm of thousands needs it.
func TestManyInOneProcess(t *testing.T) {
	f := testfleet.New(t)
	c := f.Controller()
	var mu sync.Mutex
	beating := map[string]bool{}
	f.Serve(c, protocol.UpBeat, func(node string, _ []byte) (any, error) {
		mu.Lock()
		defer mu.Unlock()
		beating[node] = true
		return nil, nil
	})
	const many = 20
	homes := make([]machine.Home, many)
	for i := range homes {
		homes[i] = agent.Home(t.TempDir())
		f.EnrolAt(homes[i], fmt.Sprintf("n-%d", i))
	}
	before := runtime.NumGoroutine()
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	for _, home := range homes {
		all.Go(func() {
			if err := agent.Run(ctx, agent.Options{Dir: home.Dir, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Host: &host{}, Facts: &heartbeat.Host{},
				Interval: 200 * time.Millisecond, Deploy: func(o *reconcile.Options) { o.Etc, o.Roots = home.Dir, home.Dir }}); err != nil {
				t.Error(err)
			}
		})
	}
	testfleet.Eventually(t, "all beat", func() bool { mu.Lock(); defer mu.Unlock(); return len(beating) == many })
	testfleet.Eventually(t, "18 goroutines an agent at most, its two at the broker included", func() bool { // some of which only connect it
		each := float64(runtime.NumGoroutine()-before) / many
		return each <= 18
	})
}
