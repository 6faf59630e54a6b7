package controller

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestDeployIsAllOrNone(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin, dora := r.person("anna", protocol.Admin), r.person("dora", protocol.Deployer)
	n1 := r.online(admin, "n1", "n2")[0]
	dora.deploy(t, "d1", 5, "n1", "n2")
	admin.released(t, "d1", "n1", "n2")
	// The rollout goes on by itself: what is counted below must not change for another reason.
	eventually(t, "the beats are written down", func() bool {
		g := value[*clientv3.GetResponse](t)(r.c.Store().Client().Get(context.Background(), "/nix-infra/heartbeats/", clientv3.WithPrefix(), clientv3.WithCountOnly()))
		return g.Count == 2
	})
	before := value[*clientv3.GetResponse](t)(r.c.Store().Client().Get(context.Background(), "/nix-infra/", clientv3.WithPrefix(), clientv3.WithKeysOnly()))

	item := func(p *person, node, deployment string, serial uint64) protocol.DeployItem {
		i, _ := p.signedManifest(t, node, deployment, serial, protocol.Switch, "a tree")
		return i
	}
	good := item(dora, "n1", "d2", 6)
	unsent := &protocol.Manifest{Version: 1, Node: "n2", Serial: 6, Deployment: "d2", Created: time.Now(), Mode: protocol.Switch, Attr: protocol.SystemAttr("n2"),
		Files: []protocol.File{{Path: "a", SHA256: protocol.Digest([]byte("never uploaded"))}}, Timeout: 60, BuildTimeout: 60}
	lacking := dora.upload(t, value[[]byte](t)(dora.Signer.Manifest(unsent)))
	for name, c := range map[string]struct {
		second protocol.DeployItem
		want   protocol.Code
	}{
		"old serial":          {item(dora, "n2", "d2", 5), protocol.Conflict},
		"unknown node":        {item(dora, "n9", "d2", 6), protocol.Unknown},
		"other's manifest":    {protocol.DeployItem{Node: "n2", Serial: 6, Digest: good.Digest}, protocol.Misaddressed},
		"serial differs":      {func() protocol.DeployItem { i := item(dora, "n2", "d2", 6); i.Serial = 7; return i }(), protocol.Invalid},
		"other deployment":    {item(dora, "n2", "d3", 6), protocol.Invalid},
		"other signer":        {item(admin, "n2", "d2", 6), protocol.Invalid},
		"manifest not sent":   {protocol.DeployItem{Node: "n2", Serial: 6, Digest: protocol.Digest([]byte("x"))}, protocol.Unknown},
		"blob not sent":       {protocol.DeployItem{Node: "n2", Serial: 6, Digest: lacking}, protocol.Unknown},
		"not a manifest":      {protocol.DeployItem{Node: "n2", Serial: 6, Digest: dora.upload(t, []byte("hello"))}, protocol.Malformed},
		"named twice":         {good, protocol.Invalid},
		"serial 0 of a stage": {protocol.DeployItem{Node: "n2", Digest: good.Digest}, protocol.Invalid},
	} {
		_, err := dora.ask(protocol.Deploy, protocol.DeployRequest{Deployment: "d2", Mode: protocol.Switch, Items: []protocol.DeployItem{good, c.second}})
		if err == nil {
			t.Fatalf("%s was accepted", name)
		}
		t.Log(name, ":", err)
		wantCode(t, err, c.want)
	}
	_, err := dora.ask(protocol.Deploy, protocol.DeployRequest{Deployment: "d1", Mode: protocol.Switch, Items: []protocol.DeployItem{item(dora, "n1", "d1", 9)}})
	wantCode(t, err, protocol.Conflict)

	after := value[*clientv3.GetResponse](t)(r.c.Store().Client().Get(context.Background(), "/nix-infra/", clientv3.WithPrefix(), clientv3.WithKeysOnly()))
	count := func(g *clientv3.GetResponse) (n int) {
		for _, kv := range g.Kvs {
			if !strings.HasPrefix(string(kv.Key), "/nix-infra/seen/") {
				n++
			}
		}
		return n
	}
	if count(before) != count(after) {
		t.Errorf("refused deployments left keys: %d, then %d", count(before), count(after))
	}
	if m, err := n1.manifest(t, ""); err != nil {
		t.Error(err)
	} else if d, _ := r.c.Store().Desired(context.Background()); d["n1"].Serial != 5 || d["n1"].Digest != m.Digest {
		t.Errorf("desired %+v, served %s", d["n1"], m.Digest)
	}

	// Asking again for what is there already, because the answer was lost, is answered alike.
	request := protocol.DeployRequest{Deployment: "d2", Mode: protocol.Switch, Items: []protocol.DeployItem{good}}
	for range 2 {
		if d := asked[protocol.Deployment](t, dora, protocol.Deploy, request); d.ID != "d2" || d.Count[""] != 1 {
			t.Fatalf("%+v", d)
		}
	}
}

func TestDryActivateDesiresNothing(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	nodes := r.online(admin, "n1", "n2")
	n1, n2 := nodes[0], nodes[1]
	sub, err := n1.nc.SubscribeSync(protocol.LookSubject("n1"))
	must(t, err)
	must(t, n1.nc.FlushTimeout(patience))
	admin.deploy(t, "d1", 1, "n1")
	value[*nats.Msg](t)(sub.NextMsg(patience)) // that it was released
	item, blob := admin.signedManifest(t, "n1", "d2", 0, protocol.DryActivate, "tried dry")
	d := asked[protocol.Deployment](t, admin, protocol.Deploy, protocol.DeployRequest{Deployment: "d2", Mode: protocol.DryActivate, Items: []protocol.DeployItem{item}})
	if d.Rollout.State != protocol.RolloutRunning || d.Rollout.Released != 1 || d.Nodes != nil {
		t.Fatalf("%+v", d)
	}
	m, err := sub.NextMsg(patience)
	must(t, err)
	if look := value[protocol.Look](t)(protocol.Decode[protocol.Look](m.Data)); look.Serial != 0 || look.Digest != item.Digest {
		t.Fatalf("%+v", look)
	}
	r.restart()
	n1.nc, n2.nc = r.dial(n1.signer, protocol.InboxPrefix("n1")), r.dial(n2.signer, protocol.InboxPrefix("n2"))
	_, err = n1.manifest(t, item.Digest)
	must(t, err)
	_, err = n1.blob(t, item.Digest, blob, 0)
	must(t, err)
	_, err = n2.manifest(t, item.Digest)
	wantCode(t, err, protocol.Unknown)
	if d, _ := r.c.Store().Desired(context.Background()); d["n1"].Deployment != "d1" {
		t.Fatalf("desired %+v", d["n1"])
	}
}

// A deployment that a crash left half taken over goes on if it was committed, and is gone if not.
func TestRecoversHalfDoneDeployments(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	n1 := r.online(admin, "n1")[0]
	items := admin.deploy(t, "d1", 1, "n1")
	admin.released(t, "d1", "n1")
	db := r.c.Store().Client()
	put := func(key, value string) {
		t.Helper()
		_, err := db.Put(context.Background(), key, value)
		must(t, err)
	}
	for id, stage := range map[string]string{"d2": "committed", "d3": "prepared"} {
		put("/nix-infra/deployments/"+id, fmt.Sprintf(`{"id":%q,"by":"anna","created":"2026-01-02T03:04:05Z","mode":"switch","stage":%q}`, id, stage))
		put("/nix-infra/deployments/"+id+"/nodes/n1", fmt.Sprintf(`{"digest":%q,"serial":%d,"wave":1}`, items[0].Digest, map[string]int{"d2": 2, "d3": 3}[id]))
	}
	put("/nix-infra/rollouts/d2", `{"strategy":{},"state":"scheduled","since":"2026-01-02T03:04:05Z","wave":0}`)
	r.restart()
	n1.nc = r.dial(n1.signer, protocol.InboxPrefix("n1"))
	n1.beat(t, protocol.Beat{Interval: 120, Serial: 1})
	vera := r.person("vera", protocol.Viewer)
	list := asked[protocol.DeploymentList](t, vera, protocol.ListDeployments, nil)
	if len(list.Deployments) != 2 {
		t.Fatalf("%+v", list)
	}
	vera.released(t, "d2", "n1")
	if d := value[map[string]protocol.Desired](t)(r.c.Store().Desired(context.Background())); d["n1"].Serial != 2 || d["n1"].Deployment != "d2" {
		t.Fatalf("%+v", d)
	}
	left := value[*clientv3.GetResponse](t)(r.c.Store().Client().Get(context.Background(), "/nix-infra/deployments/d3", clientv3.WithPrefix()))
	if len(left.Kvs) != 0 {
		t.Fatalf("left: %v", left.Kvs)
	}
}

// TestMain runs the program itself where a test wants a process that it can kill.
func TestMain(m *testing.M) {
	if dir := os.Getenv("NIX_INFRA_TEST_CONTROLLER"); dir != "" {
		cmd := Command()
		cmd.SetArgs([]string{"run", "--dir", dir})
		if err := cmd.Execute(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var tlsAddress = regexp.MustCompile(`msg=serving .*tls=(\S+)`)

// spawn runs the controller as a process, and tells how to kill it and how long it took to serve.
func (r *rig) spawn() (*exec.Cmd, time.Duration) {
	r.t.Helper()
	began := time.Now()
	cmd, serving := r.launch(r.cfg.Dir, "broker: {listen: '127.0.0.1:0', websocket: ''}")
	url, ok := <-serving
	if !ok {
		r.t.Fatal("the controller ended without serving")
	}
	r.url = url
	return cmd, time.Since(began)
}

// launch starts a controller as a process. Its URL comes when it serves; the channel is closed when it has ended.
func (r *rig) launch(dir, config string) (*exec.Cmd, <-chan string) {
	r.t.Helper()
	must(r.t, os.WriteFile(filepath.Join(dir, "controller.yaml"), []byte(config), 0o600))
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "NIX_INFRA_TEST_CONTROLLER="+dir)
	out := value[io.ReadCloser](r.t)(cmd.StderrPipe())
	starting.Lock()
	err := cmd.Start()
	starting.Unlock()
	must(r.t, err)
	r.t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may be dead
		_ = cmd.Wait()
	})
	serving := make(chan string, 1)
	go func() {
		defer close(serving)
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 1<<20) // whoever stops reading stops the controller
		for lines.Scan() {
			if m := tlsAddress.FindStringSubmatch(lines.Text()); m != nil {
				serving <- m[1]
			}
		}
	}()
	return cmd, serving
}

// What was acknowledged survives kill -9, and the controller serves again at once.
func TestKillKeepsAcknowledged(t *testing.T) {
	r := enrolled(t)
	process, _ := r.spawn()
	admin := r.person("anna", protocol.Admin)
	n1 := r.node(admin, "n1")
	var item protocol.DeployItem
	for round := 1; round <= 3; round++ {
		id := fmt.Sprintf("d%d", round)
		item = admin.deploy(t, id, uint64(round), "n1")[0]
		must(t, process.Process.Signal(syscall.SIGKILL))
		_ = process.Wait() // it was killed
		var took time.Duration
		process, took = r.spawn()
		t.Logf("serving %s after the start", took)
		if took > 50*time.Second { // it takes half a second; one that waits for the lead that it had would take a minute
			t.Errorf("serving after %s only", took)
		}
		admin = &person{admin.Signer, r, "anna", r.dial(admin.Signer, "ni.v1.reply.anna")}
		n1.nc = r.dial(n1.signer, protocol.InboxPrefix("n1"))
		n1.beat(t, protocol.Beat{Interval: 120})
		eventually(t, fmt.Sprintf("n1 is given %s after round %d", item.Digest, round), func() bool {
			m, err := n1.manifest(t, "")
			must(t, err)
			return m.Digest == item.Digest
		})
	}
	must(t, process.Process.Signal(syscall.SIGTERM))
	if err := process.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

func TestUploads(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	dora := r.person("dora", protocol.Deployer)
	big := make([]byte, protocol.MaxFileSize) // does not compress
	value[int](t)(rand.Read(big))
	if d := dora.upload(t, big); !r.c.broker.Blobs.Has(d) {
		t.Fatal("the largest file was not kept")
	}
	if d := dora.upload(t, nil); !r.c.broker.Blobs.Has(d) {
		t.Fatal("the empty file was not kept")
	}
	put := func(p protocol.BlobPiece) error { _, err := dora.ask(protocol.PutBlobs, onePiece(p)); return err }
	data := big[:protocol.ChunkSize+100]
	packed, digest := compress(t, data), protocol.Digest(data)
	piece := func(from, to int) protocol.BlobPiece {
		return protocol.BlobPiece{Digest: digest, Size: int64(len(packed)), Offset: int64(from), Data: packed[from:to]}
	}
	bomb := compress(t, bytes.Repeat([]byte{0}, protocol.MaxFileSize+1))
	for name, c := range map[string]struct {
		piece protocol.BlobPiece
		want  protocol.Code
	}{
		"second piece first": {piece(10, 20), protocol.Conflict},
		"no digest":          {protocol.BlobPiece{Digest: "../../etc/passwd", Size: 1, Data: []byte("x")}, protocol.Invalid},
		"too big":            {protocol.BlobPiece{Digest: digest, Size: 1 << 40, Data: []byte("x")}, protocol.Invalid},
		"negative":           {protocol.BlobPiece{Digest: digest, Size: -1}, protocol.Invalid},
		"beyond the end":     {protocol.BlobPiece{Digest: digest, Size: 3, Offset: 2, Data: []byte("xx")}, protocol.Invalid},
		"empty piece":        {protocol.BlobPiece{Digest: digest, Size: 3}, protocol.Invalid},
		"overflow":           {protocol.BlobPiece{Digest: digest, Size: 3, Offset: 1<<63 - 1, Data: []byte("x")}, protocol.Invalid},
		"not zstd":           {protocol.BlobPiece{Digest: digest, Size: 3, Data: []byte("abc")}, protocol.Invalid},
		"a bomb":             {protocol.BlobPiece{Digest: digest, Size: int64(len(bomb)), Data: bomb}, protocol.Invalid},
	} {
		if err := put(c.piece); err == nil || !strings.Contains(fmt.Sprintf("%T", err), "Refusal") || err.(*protocol.Refusal).Code != c.want {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
	}
	must(t, put(piece(0, 100)))
	must(t, put(piece(0, 200))) // again, or another run
	must(t, put(piece(100, 300)))
	if err := put(piece(301, 400)); err == nil {
		t.Error("a gap was accepted")
	}
	wrong := piece(300, len(packed))
	wrong.Data = append([]byte{}, wrong.Data...)
	wrong.Data[len(wrong.Data)/2] ^= 1
	must(t, put(protocol.BlobPiece{Digest: digest, Size: wrong.Size, Offset: 300, Data: wrong.Data[:1000]}))
	if err := put(protocol.BlobPiece{Digest: digest, Size: wrong.Size, Offset: 1300, Data: wrong.Data[1000:]}); err == nil || r.c.broker.Blobs.Has(digest) {
		t.Errorf("a damaged blob was kept (%v)", err)
	}
	// Two runs at once send the same; who is behind when it is whole goes on, too.
	both := compress(t, big[:3000])
	part := func(from, to int) protocol.BlobPiece {
		return protocol.BlobPiece{Digest: protocol.Digest(big[:3000]), Size: int64(len(both)), Offset: int64(from), Data: both[from:to]}
	}
	for _, p := range []protocol.BlobPiece{part(0, 1000), part(0, 500), part(1000, 2000), part(500, 1500), part(2000, len(both)), part(1500, 2500), part(2500, len(both))} {
		must(t, put(p))
	}
	if !r.c.broker.Blobs.Has(protocol.Digest(big[:3000])) {
		t.Error("what two runs sent was not put together")
	}
	// Many at once: what comes before a bad one stays, and sending all of it again is no mistake.
	small := func(text string) protocol.BlobPiece {
		packed := compress(t, []byte(text))
		return protocol.BlobPiece{Digest: protocol.Digest([]byte(text)), Size: int64(len(packed)), Data: packed}
	}
	one, bad, two := small("one"), small("bad"), small("two")
	bad.Data = small("worse").Data
	bad.Size = int64(len(bad.Data))
	many := func(pieces ...protocol.BlobPiece) error {
		_, err := dora.ask(protocol.PutBlobs, protocol.BlobPieces{Pieces: pieces})
		return err
	}
	wantCode(t, many(one, bad, two), protocol.Invalid)
	if b := r.c.broker.Blobs; !b.Has(one.Digest) || b.Has(bad.Digest) || b.Has(two.Digest) {
		t.Error("not just what came before the bad one was kept")
	}
	must(t, many(one, two, piece(0, 100), piece(100, 200)))
	if !r.c.broker.Blobs.Has(two.Digest) {
		t.Error("two was not kept")
	}
	third := protocol.ChunkSize
	wantCode(t, many(), protocol.Invalid)
	wantCode(t, many(slices.Repeat([]protocol.BlobPiece{one}, protocol.MaxPieces+1)...), protocol.Invalid)
	wantCode(t, many(piece(0, third), piece(0, third), one), protocol.Invalid)

	missing := asked[protocol.DigestList](t, dora, protocol.MissingBlobs, protocol.DigestList{Digests: []string{digest, protocol.Digest(big)}})
	if len(missing.Digests) != 1 || missing.Digests[0] != digest {
		t.Errorf("missing: %v", missing)
	}
	must(t, put(piece(200, len(packed))))
	if left, _ := filepath.Glob(filepath.Join(r.cfg.Dir, "spool", "*")); len(left) != 0 {
		t.Errorf("spools are left: %v", left)
	}

	// All of it comes back in pieces, after a restart too.
	admin := r.person("anna", protocol.Admin)
	r.node(admin, "n1")
	m := &protocol.Manifest{Version: 1, Node: "n1", Serial: 1, Deployment: "d1", Created: time.Now(), Mode: protocol.Switch, Attr: protocol.SystemAttr("n1"),
		Files: []protocol.File{{Path: "big", SHA256: protocol.Digest(big), Size: int64(len(big))}}, Timeout: 60, BuildTimeout: 60}
	item := protocol.DeployItem{Node: "n1", Serial: 1, Digest: admin.upload(t, value[[]byte](t)(admin.Signer.Manifest(m)))}
	asked[protocol.Deployment](t, admin, protocol.Deploy, protocol.DeployRequest{Deployment: "d1", Mode: protocol.Switch, Items: []protocol.DeployItem{item}})
	s := r.signer("n1", protocol.Node)
	r.restart()
	n1 := &machineNode{"n1", s, r.dial(s, protocol.InboxPrefix("n1"))}
	n1.beat(t, protocol.Beat{Interval: 120})
	eventually(t, "n1 may have it", func() bool { m, err := n1.manifest(t, ""); must(t, err); return m.Digest == item.Digest })
	var got []byte
	for {
		b, err := n1.blob(t, item.Digest, protocol.Digest(big), int64(len(got)))
		must(t, err)
		if got = append(got, b.Data...); int64(len(got)) == b.Size {
			break
		}
	}
	if !bytes.Equal(got, compress(t, big)) {
		t.Error("the blob came back changed")
	}
}

func TestGarbage(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	n1 := r.online(admin, "n1")[0]
	var items []protocol.DeployItem
	for i := range 5 {
		id := fmt.Sprintf("d%d", i)
		items = append(items, admin.deploy(t, id, uint64(i+1), "n1")...)
		admin.released(t, id, "n1")
	}
	loose := admin.upload(t, []byte("nobody's"))
	term := r.c.current.Load()
	blobs := r.c.broker.Blobs
	if n := value[int](t)(term.collect(context.Background(), time.Hour)); n != 0 || !blobs.Has(loose) {
		t.Fatalf("%d blobs went that are new", n)
	}
	// Two deployments beyond the newest three: a manifest and a file each, and the loose blob.
	if n := value[int](t)(term.collect(context.Background(), 0)); n != 5 || blobs.Has(loose) || blobs.Has(items[1].Digest) || !blobs.Has(items[2].Digest) {
		t.Fatalf("%d blobs went", n)
	}
	if m, err := n1.manifest(t, ""); err != nil || m.Digest != items[4].Digest {
		t.Fatal(err)
	}
	must(t, blobs.Load(context.Background()))
	if blobs.Has(loose) || !blobs.Has(items[4].Digest) {
		t.Error("the object store holds something else than the memory")
	}
	if admin.upload(t, []byte("nobody's")); !blobs.Has(loose) {
		t.Error("a removed blob can't be put again")
	}
}

func TestRequestAndLoad(t *testing.T) {
	dir := t.TempDir()
	run := func(in string, args ...string) (string, error) {
		cmd := Command()
		var out bytes.Buffer
		cmd.SetOut(&out)
		cmd.SetIn(strings.NewReader(in))
		cmd.SetArgs(append(args, "--dir", dir))
		err := cmd.Execute()
		return out.String(), err
	}
	out, err := run("", "request", "--name", "ctl1")
	must(t, err)
	var req protocol.EnrolRequest
	must(t, json.Unmarshal([]byte(out), &req))
	if req.Role != protocol.Controller || req.Validate() != nil || strings.Count(out, "\n") != 1 {
		t.Fatalf("%s", out)
	}
	for _, args := range [][]string{{"load", "-"}, {"check-config"}, {"run"}, {"request", "--name", "No!"}, {"request"}, {"nonsense"}} {
		if _, err := run("{}", args...); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v: %v", args, err)
		}
	}
	if out, err := run("", "version"); err != nil || !strings.Contains(out, "protocol 1") {
		t.Errorf("%s, %v", out, err)
	}
}
