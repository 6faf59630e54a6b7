package controller

import (
	"context"
	"fmt"
	"net/url"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/nix-infra/nix-infra/protocol"
)

func (r *rig) state(t testing.TB, viewer *person, node string) protocol.NodeState {
	t.Helper()
	l := asked[protocol.NodeList](t, viewer, protocol.ListNodes, protocol.Page{Names: []string{node}})
	if len(l.Nodes) != 1 {
		t.Fatalf("%d nodes are called %s", len(l.Nodes), node)
	}
	return l.Nodes[0]
}

func (r *rig) revision(t testing.TB) int64 {
	t.Helper()
	g, err := r.c.Store().Client().Get(context.Background(), "/")
	must(t, err)
	return g.Header.Revision
}

func TestQuietNodesCostEtcdNothing(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin, vera := r.person("anna", protocol.Admin), r.person("vera", protocol.Viewer)
	const count = 50
	var nodes []*machineNode
	for i := range count {
		nodes = append(nodes, r.node(admin, fmt.Sprintf("n%d", i)))
	}
	stranger := r.signer("stranger", protocol.Node)
	nc := r.dial(stranger, protocol.InboxPrefix("stranger"))
	beats := func(round int64) {
		for _, n := range nodes {
			n.beat(t, protocol.Beat{Interval: 60, NixOS: "26.11", FailedUnits: []string{"x.service"}, Vitals: protocol.Vitals{Uptime: round}})
		}
		must(t, nc.Publish(protocol.UpSubject("stranger", protocol.UpBeat), protocol.Encode(protocol.Beat{Version: 1, Vitals: protocol.Vitals{Uptime: round}})))
		must(t, nc.FlushTimeout(patience))
		last := nodes[count-1].name
		eventually(t, "the beats are known", func() bool {
			s := r.state(t, vera, last)
			return s.Beat != nil && s.Beat.Vitals.Uptime == round
		})
	}
	beats(1)
	eventually(t, "they are written down", func() bool {
		g, err := r.c.Store().Client().Get(context.Background(), "/nix-infra/heartbeats/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		must(t, err)
		return g.Count == count
	})
	before := r.revision(t)
	for round := int64(2); round < 12; round++ {
		beats(round)
	}
	if now := r.revision(t); now != before {
		t.Errorf("%d beats without news cost %d revisions", 10*count, now-before)
	}
	if l := asked[protocol.NodeList](t, vera, protocol.ListNodes, nil); len(l.Nodes) != count {
		t.Errorf("%d nodes are listed; a stranger beats", len(l.Nodes))
	}
}

func TestLostIsShownOverRestart(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	n1 := r.node(admin, "n1")
	if s := r.state(t, admin, "n1"); s.State() != "new" || s.LastSeen != nil {
		t.Fatalf("%+v", s)
	}
	n1.beat(t, protocol.Beat{Interval: 1, NixOS: "26.11"})
	eventually(t, "online, and then lost", func() bool {
		s := r.state(t, admin, "n1")
		return s.LastSeen != nil && !s.Online
	})
	seen := *r.state(t, admin, "n1").LastSeen
	eventually(t, "the loss is written down", func() bool {
		g, err := r.c.Store().Client().Get(context.Background(), "/nix-infra/last/n1")
		must(t, err)
		return g.Count == 1
	})
	r.restart()
	admin = r.person("anna", protocol.Admin)
	s := r.state(t, admin, "n1")
	if s.State() != "lost" || !s.LastSeen.Equal(seen) || s.Beat.NixOS != "26.11" {
		t.Fatalf("%+v, was seen %s", s, seen)
	}
	n1.nc = r.dial(n1.signer, protocol.InboxPrefix("n1"))
	n1.beat(t, protocol.Beat{Interval: 60})
	eventually(t, "back", func() bool { return r.state(t, admin, "n1").Online })
}

// A node whose beat shows that it is behind is told, each time, until it is not.
func TestBeatsAreAnsweredWithLook(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	n1 := r.online(admin, "n1")[0]
	sub := value[*nats.Subscription](t)(n1.nc.SubscribeSync(protocol.LookSubject("n1")))
	must(t, n1.nc.FlushTimeout(patience))
	item := admin.deploy(t, "d1", 5, "n1")[0]
	value[*nats.Msg](t)(sub.NextMsg(patience)) // that it was released
	// told is what a beat is answered with, up to the answer to another one, whose account is old.
	told := func(b protocol.Beat) (looks []protocol.Look) {
		t.Helper()
		n1.beat(t, b)
		n1.beat(t, protocol.Beat{Interval: 10, Serial: 5, Account: 1})
		for {
			l := value[protocol.Look](t)(protocol.Decode[protocol.Look](value[*nats.Msg](t)(sub.NextMsg(patience)).Data))
			if l.Digest != item.Digest || l.Serial != 5 || l.Account != "" && l.Account != r.c.verifier.Account() {
				t.Fatalf("%+v", l)
			}
			if l.Account != "" {
				return looks
			}
			looks = append(looks, l)
		}
	}
	for range 2 {
		if looks := told(protocol.Beat{Interval: 10, Serial: 4}); len(looks) != 1 {
			t.Fatalf("a node that is behind was told %+v", looks)
		}
	}
	if looks := told(protocol.Beat{Interval: 10, Serial: 5}); len(looks) > 0 {
		t.Fatalf("a node that is not behind was told %+v", looks)
	}
	if m := value[protocol.ManifestReply](t)(n1.manifest(t, "")); m.Account != r.c.verifier.Account() {
		t.Fatalf("a node with an old account got %q with its manifest", m.Account)
	}
	current := protocol.Beat{Interval: 10, Serial: 5, Account: r.c.verifier.Issued()}
	if looks := told(current); len(looks) > 0 {
		t.Fatalf("a node with the newest account was told %+v", looks)
	}
	n1.beat(t, current)
	eventually(t, "the beat", func() bool {
		alive, _ := r.c.current.Load().alive.State("n1")
		return alive.Beat.Account == current.Account
	})
	if m := value[protocol.ManifestReply](t)(n1.manifest(t, "")); m.Account != "" || m.Digest != item.Digest {
		t.Fatalf("a node with the newest account got %+v", m)
	}
}

// A second controller works on the broker and the etcd that somebody else runs, stands by while
// another one leads, and takes over.
func TestExternalAndTakeOver(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	endpoint := externalEtcd(t)
	on := func(name string) Config {
		cfg := DefaultConfig(t.TempDir())
		r.enrol(cfg.Dir, name)
		cfg.Broker.External = []string{r.url}
		cfg.Etcd.External.Endpoints = []string{endpoint}
		return cfg
	}
	// The embedding one only lends its broker from here on.
	r.c.current.Load().stop()
	first := value[*Controller](t)(Start(context.Background(), on("ctl2"), testLog()))
	await(t, first.Serving())
	second := value[*Controller](t)(Start(context.Background(), on("ctl3"), testLog()))
	defer second.Stop()
	admin := r.person("anna", protocol.Admin)
	n1 := r.online(admin, "n1")[0]
	item := admin.deploy(t, "d1", 5, "n1")[0]
	admin.released(t, "d1", "n1")
	select {
	case <-second.Serving():
		t.Fatal("two serve")
	default:
	}
	must(t, first.Stop())
	await(t, second.Serving())
	m, err := n1.manifest(t, "")
	must(t, err)
	if m.Digest != item.Digest {
		t.Fatalf("the new leader gives %q", m.Digest)
	}
	must(t, second.Healthy(context.Background()))
}

func await(t testing.TB, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("not within %s", patience)
	}
}

// externalEtcd is an etcd with a port, as somebody else runs one.
func externalEtcd(t testing.TB) string {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	e := value[*embed.Etcd](t)(embed.StartEtcd(cfg))
	t.Cleanup(e.Close)
	await(t, e.Server.ReadyNotify())
	return "http://" + e.Clients[0].Addr().String()
}

// BenchmarkBeats is what the controller does with the beats of 10,000 nodes, the broker not counted.
// 10,000 nodes that beat every 10 s are 1,000 beats a second.
func BenchmarkBeats(b *testing.B) {
	r := startRig(b)
	term := r.c.current.Load()
	const count = 10_000
	for i := range count {
		term.fleet.putNode(protocol.NodeRecord{Name: fmt.Sprintf("n%05d", i)})
	}
	data := protocol.Encode(protocol.Beat{Version: 1, Interval: 10, Kernel: "6.18.2", NixOS: "26.11", BootID: protocol.NewID(),
		Closure: "/nix/store/00000000000000000000000000000000-nixos-system", Vitals: protocol.Vitals{Uptime: 1, MemTotal: 1 << 34}})
	before := r.revision(b)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		term.beat(&nats.Msg{Subject: protocol.UpSubject(fmt.Sprintf("n%05d", i%count), protocol.UpBeat), Data: data})
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/10, "%core@1000/s")
	b.ReportMetric(float64(r.revision(b)-before), "revisions")
}
