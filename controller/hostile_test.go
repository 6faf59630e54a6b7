package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/nix-infra/nix-infra/protocol"
)

// auditRecords are all of the controller's records, in order, checked to be one chain.
func (r *rig) auditRecords(t testing.TB) []protocol.AuditRecord {
	t.Helper()
	stream := r.c.broker.Audit
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	info := value[*jetstream.StreamInfo](t)(stream.Info(ctx))
	var records []protocol.AuditRecord
	prev := ""
	for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
		m := value[*jetstream.RawStreamMsg](t)(stream.GetMsg(ctx, seq))
		if m.Subject != protocol.ControllerAudit("ctl1") {
			continue
		}
		a := value[protocol.AuditRecord](t)(protocol.Decode[protocol.AuditRecord](m.Data))
		if a.Prev != prev || a.Seq != uint64(len(records)+1) || a.At != "ctl1" {
			t.Fatalf("the chain is broken at %d: %+v", seq, a)
		}
		prev = protocol.Digest(m.Data)
		records = append(records, a)
	}
	return records
}

func TestHostileRequests(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin, vera, dora := r.person("anna", protocol.Admin), r.person("vera", protocol.Viewer), r.person("dora", protocol.Deployer)
	r.node(admin, "n1")
	stranger := enrolled(t)
	sign := func(p *protocol.Signer, a protocol.Action, change func(*protocol.Header), body any) *protocol.Signed {
		now := time.Now()
		h := protocol.Header{Version: 1, Kind: protocol.KindRequest, ID: protocol.NewID(), Action: a, Target: protocol.ControllerName,
			NotBefore: now.Unix(), Expires: now.Add(time.Minute).Unix()}
		if change != nil {
			change(&h)
		}
		return value[*protocol.Signed](t)(p.Sign(h, protocol.Encode(body)))
	}
	tags := protocol.TagsRequest{Node: "n1", Tags: []string{"hacked"}}
	tag := func(change func(*protocol.Header)) *protocol.Signed {
		return sign(dora.Signer, protocol.TagNode, change, tags)
	}
	alter := func(s *protocol.Signed, f func(*protocol.Signed)) *protocol.Signed { f(s); return s }
	manifest := &protocol.Manifest{}

	for name, c := range map[string]struct {
		signed *protocol.Signed
		want   protocol.Code
		user   string // that the audit record names
	}{
		"unsigned":     {alter(tag(nil), func(s *protocol.Signed) { s.Signature = nil }), protocol.Unsigned, ""},
		"no user":      {alter(tag(nil), func(s *protocol.Signed) { s.User = "" }), protocol.Unsigned, ""},
		"forged":       {alter(tag(nil), func(s *protocol.Signed) { s.Signature[0] ^= 1 }), protocol.Forged, ""},
		"as another":   {alter(tag(nil), func(s *protocol.Signed) { s.User = admin.User }), protocol.Forged, ""},
		"tampered":     {alter(tag(nil), func(s *protocol.Signed) { s.Payload = []byte(`{"node":"n1"}`) }), protocol.Tampered, "dora"},
		"expired":      {tag(func(h *protocol.Header) { h.NotBefore -= 600; h.Expires -= 600 }), protocol.Expired, "dora"},
		"not yet":      {tag(func(h *protocol.Header) { h.NotBefore += 600; h.Expires += 600 }), protocol.NotYet, "dora"},
		"for ever":     {tag(func(h *protocol.Header) { h.Expires += 6000 }), protocol.Invalid, "dora"},
		"to a node":    {tag(func(h *protocol.Header) { h.Target = "n1" }), protocol.Misaddressed, "dora"},
		"to all":       {tag(func(h *protocol.Header) { h.Target = protocol.Everyone }), protocol.Misaddressed, "dora"},
		"over role":    {sign(vera.Signer, protocol.TagNode, nil, tags), protocol.OverRole, "vera"},
		"by a node":    {sign(r.signer("n1", protocol.Node), protocol.TagNode, nil, tags), protocol.OverRole, "n1"},
		"a controller": {sign(r.signer("ctl9", protocol.Controller), protocol.TagNode, nil, tags), protocol.OverRole, "ctl9"},
		"a stranger":   {sign(stranger.signer("dora", protocol.Admin), protocol.TagNode, nil, tags), protocol.Untrusted, ""},
		"a manifest":   {tag(func(h *protocol.Header) { h.Kind = protocol.KindManifest }), protocol.Malformed, ""},
		"next version": {tag(func(h *protocol.Header) { h.Version = 2 }), protocol.OtherVersion, ""},
		"evil id":      {tag(func(h *protocol.Header) { h.ID = "x._controller y\r\nPUB a 0" }), protocol.Malformed, ""},
		"id of tokens": {tag(func(h *protocol.Header) { h.ID = "a.b" }), protocol.Malformed, ""},
		"no action":    {sign(admin.Signer, "no-such-action", nil, manifest), protocol.Unknown, "anna"},
		"bad body":     {sign(dora.Signer, protocol.TagNode, nil, "text"), protocol.Invalid, "dora"},
	} {
		t.Run(name, func(t *testing.T) {
			before := len(r.auditRecords(t))
			// The attacker has a connection that may publish anything that an admin may.
			answers := value[*nats.Subscription](t)(admin.nc.SubscribeSync("ni.v1.reply.anna.>"))
			defer answers.Unsubscribe()
			must(t, admin.nc.PublishRequest("ni.v1.ctl.req.admin",
				protocol.ReplySubject("anna", "attack", protocol.ControllerName), protocol.Encode(c.signed)))
			var last protocol.AuditRecord
			eventually(t, "audit", func() bool {
				all := r.auditRecords(t)
				if len(all) > before {
					last = all[len(all)-1]
				}
				return len(all) > before && last.Outcome != ""
			})
			if last.Outcome != string(c.want) || last.User != c.user || last.Reason == "" {
				t.Fatalf("recorded %+v, want %s of %q", last, c.want, c.user)
			}
			if c.user == "" || c.user == "anna" {
				m, err := answers.NextMsg(patience)
				must(t, err)
				reply := value[protocol.Reply](t)(protocol.Decode[protocol.Reply](m.Data))
				if reply.Refused == nil || reply.Refused.Code != c.want {
					t.Fatalf("answered %+v", reply)
				}
			}
		})
	}
	list := asked[protocol.NodeList](t, vera, protocol.ListNodes, nil)
	if len(list.Nodes) != 1 || len(list.Nodes[0].Tags) != 0 {
		t.Fatalf("a refused request had an effect: %+v", list)
	}

	t.Run("malformed", func(t *testing.T) {
		_, err := vera.sendRaw("ni.v1.ctl.req.viewer", []byte("{"), "x1")
		wantCode(t, err, protocol.Malformed)
	})
	t.Run("another version's subject", func(t *testing.T) {
		sub := value[*nats.Subscription](t)(vera.nc.SubscribeSync("ni.v2.reply.vera.q._controller"))
		must(t, vera.nc.PublishRequest("ni.v2.ctl.req.viewer", "ni.v2.reply.vera.q._controller", []byte("anything")))
		m := value[*nats.Msg](t)(sub.NextMsg(patience))
		if !strings.Contains(string(m.Data), string(protocol.OtherVersion)) {
			t.Fatalf("%s", m.Data)
		}
	})
	t.Run("an answer elsewhere", func(t *testing.T) {
		// Without a proven sender nothing is sent to anybody else than a user's reply subject.
		sub := value[*nats.Subscription](t)(r.node(admin, "n2").nc.SubscribeSync("ni.v1.node.n2.down.>"))
		before := len(r.auditRecords(t))
		must(t, vera.nc.PublishRequest("ni.v1.ctl.req.viewer", "ni.v1.node.n2.down.look", []byte("{}")))
		eventually(t, "audit", func() bool { return len(r.auditRecords(t)) > before })
		if m, err := sub.NextMsg(100 * time.Millisecond); err == nil {
			t.Fatalf("n2 got %s", m.Data)
		}
	})
}

// A flood of what nobody is proven to have sent must not fill the audit, and hides nothing of its extent.
func TestFloodOfUnprovenRequests(t *testing.T) {
	t.Parallel()
	const flood = 2000
	r := startRig(t)
	vera := r.person("vera", protocol.Viewer)
	started := time.Now()
	for range flood {
		must(t, vera.nc.Publish("ni.v1.ctl.req.viewer", []byte("{}")))
	}
	asked[protocol.NodeList](t, vera, protocol.ListNodes, nil)
	count := func() (written, ignored int) {
		for _, a := range r.auditRecords(t) {
			if a.User != "" {
				continue
			}
			written++
			if n := 0; strings.HasPrefix(a.Reason, "(") {
				value[int](t)(fmt.Sscanf(a.Reason, "(%d more", &n))
				ignored += n
			}
		}
		return written, ignored
	}
	eventually(t, "every request is accounted for", func() bool {
		must(t, vera.nc.Publish("ni.v1.ctl.req.viewer", []byte("{}"))) // what comes next tells of the ones before
		written, ignored := count()
		return written+ignored >= flood
	})
	if written, _ := count(); written > 40+20*int(time.Since(started)/time.Second) {
		t.Errorf("%d records in %s", written, time.Since(started))
	}
}

// As many questions as a viewer may ask, they keep nobody from being heard who has more to say, such as that the viewer's
// credentials are void.
func TestViewersAreInNobodysWay(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	vera, anna := r.person("vera", protocol.Viewer), r.person("anna", protocol.Admin)
	places := r.c.current.Load().users[protocol.Viewer]
	for range cap(places) {
		places <- struct{}{} // somebody works on questions that take long
	}
	answered := make(chan error, 1)
	go func() {
		_, err := vera.ask(protocol.ListNodes, nil)
		answered <- err
	}()
	r.node(anna, "n1")
	select {
	case err := <-answered:
		t.Errorf("a question too many was worked on (%v)", err)
	default:
	}
	<-places
	must(t, <-answered)
}

func TestReplays(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	dora, vera := r.person("dora", protocol.Deployer), r.person("vera", protocol.Viewer)
	admin := r.person("anna", protocol.Admin)
	r.node(admin, "n1")
	read, readID, err := vera.Request(protocol.ListNodes, protocol.ControllerName, nil, time.Now())
	must(t, err)
	change, changeID, err := dora.Request(protocol.TagNode, protocol.ControllerName, protocol.TagsRequest{Node: "n1", Tags: []string{"a"}}, time.Now())
	must(t, err)
	_, err = vera.send(protocol.ListNodes, read, readID)
	must(t, err)
	_, err = dora.send(protocol.TagNode, change, changeID)
	must(t, err)
	_, err = vera.send(protocol.ListNodes, read, readID)
	wantCode(t, err, protocol.Replayed)
	_, err = dora.send(protocol.TagNode, change, changeID)
	wantCode(t, err, protocol.Replayed)

	r.restart()
	dora = &person{dora.Signer, r, "dora", r.dial(dora.Signer, "ni.v1.reply.dora")}
	_, err = dora.send(protocol.TagNode, change, changeID)
	wantCode(t, err, protocol.Replayed)
}

// The broker itself must keep everybody to their own subjects.
func TestBrokerPermissions(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	n1, n2 := r.node(admin, "n1"), r.node(admin, "n2")
	vera := r.person("vera", protocol.Viewer)
	denied := func(who string, nc *nats.Conn, try func() error) {
		t.Helper()
		refused := make(chan error, 10)
		nc.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { refused <- err })
		if err := try(); err == nil {
			must(t, nc.FlushTimeout(patience))
			select {
			case err = <-refused:
				if !errors.Is(err, nats.ErrPermissionViolation) {
					t.Errorf("%s: %v", who, err)
				}
			case <-time.After(patience):
				t.Errorf("%s was not refused", who)
			}
		}
	}
	subscribe := func(nc *nats.Conn, subject string) func() error {
		return func() error { _, err := nc.SubscribeSync(subject); return err }
	}
	publish := func(nc *nats.Conn, subject string) func() error {
		return func() error { return nc.Publish(subject, []byte("{}")) }
	}
	for _, s := range []string{"ni.v1.node.n2.down.>", "ni.v1.node.n2.req.viewer", "ni.v1.node.*.up.*", "ni.v1.ctl.req.*", "ni.v1.controller.ctl1.>", ">", "$JS.>", "_INBOX.>", "$SYS.>"} {
		denied("n1 reads "+s, n1.nc, subscribe(n1.nc, s))
	}
	for _, s := range []string{"ni.v1.node.n2.up.beat", "ni.v1.node.n2.down.look", "ni.v1.reply.vera.x.n2", "ni.v1.ctl.req.viewer", "ni.v1.controller.ctl1.audit", "$JS.API.INFO", "$O.blobs.M.x", "ni.v1.node.n1.down.look"} {
		denied("n1 writes "+s, n1.nc, publish(n1.nc, s))
	}
	for _, s := range []string{"ni.v1.reply.anna.>", "ni.v1.node.*.up.*", "ni.v1.controller.>", "ni.v1.ctl.req.*"} {
		denied("vera reads "+s, vera.nc, subscribe(vera.nc, s))
	}
	for _, s := range []string{"ni.v1.ctl.req.deployer", "ni.v1.reply.anna.x._controller", "$JS.API.STREAM.LIST", "ni.v1.node.n1.up.beat"} {
		denied("vera writes "+s, vera.nc, publish(vera.nc, s))
	}
	if _, err := n2.ask(protocol.UpPing, struct{}{}); err != nil {
		t.Errorf("n2's own ping: %v", err)
	}
	stranger := enrolled(t).signer("n1", protocol.Node)
	if err := r.mayConnect(stranger); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("another fleet's node: %v", err)
	}
}

// A node must not obtain another's tree, whatever it asks for.
func TestPrivateTrees(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	nodes := r.online(admin, "n1", "n2")
	n1, n2 := nodes[0], nodes[1]
	item1, blob1 := admin.signedManifest(t, "n1", "d1", 1, protocol.Switch, "n1's secret")
	item2, blob2 := admin.signedManifest(t, "n2", "d1", 1, protocol.Switch, "n2's secret")
	loose := admin.upload(t, []byte("nobody's"))
	asked[protocol.Deployment](t, admin, protocol.Deploy, protocol.DeployRequest{Deployment: "d1", Mode: protocol.Switch, Items: []protocol.DeployItem{item1, item2}})
	admin.released(t, "d1", "n1", "n2")

	b, err := n1.blob(t, item1.Digest, blob1, 0)
	must(t, err)
	if string(b.Data) != string(compress(t, []byte("n1's secret"))) {
		t.Fatalf("%q", b.Data)
	}
	_, err = n1.manifest(t, item2.Digest)
	wantCode(t, err, protocol.Unknown)
	for name, q := range map[string]protocol.BlobQuery{
		"other's blob by own manifest":     {Manifest: item1.Digest, Blob: blob2},
		"other's blob by other's manifest": {Manifest: item2.Digest, Blob: blob2},
		"own blob by other's manifest":     {Manifest: item2.Digest, Blob: blob1},
		"nobody's blob":                    {Manifest: item1.Digest, Blob: loose},
		"a manifest as a blob":             {Manifest: item1.Digest, Blob: item2.Digest},
		"no manifest":                      {Blob: blob2},
		"a blob as manifest":               {Manifest: blob2, Blob: blob2},
	} {
		if _, err := n1.blob(t, q.Manifest, q.Blob, 0); !errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err = n1.blob(t, item1.Digest, blob1, -1)
	wantCode(t, err, protocol.Invalid)
	_, err = n1.blob(t, item1.Digest, blob1, 1<<40)
	wantCode(t, err, protocol.Invalid)

	// An answer that would go to the other node, or anywhere but below its own inbox, is not sent.
	sub := value[*nats.Subscription](t)(n2.nc.SubscribeSync("ni.v1.node.n2.down.>"))
	must(t, n2.nc.FlushTimeout(patience))
	for _, reply := range []string{"ni.v1.node.n2.down.x", "ni.v1.reply.anna.x._controller", "ni.v1.node.n1.downx"} {
		must(t, n1.nc.PublishRequest(protocol.UpSubject("n1", protocol.UpManifest), reply, nil))
	}
	must(t, n1.nc.FlushTimeout(patience))
	if _, err := n1.ask(protocol.UpPing, struct{}{}); err != nil { // served after the ones before it were taken
		t.Fatal(err)
	}
	if m, err := sub.NextMsg(100 * time.Millisecond); err == nil {
		t.Fatalf("n2 got %s", m.Data)
	}
	// Nor can it report for another, or for a deployment that it has no part in.
	_, err = n1.ask(protocol.UpReport, protocol.Report{Version: 1, Deployment: "d1", Serial: 9, Phase: protocol.Confirmed})
	wantCode(t, err, protocol.Unknown)

	// What is superseded is nobody's any more; a removed node has nothing.
	admin.deploy(t, "d2", 2, "n1")
	admin.released(t, "d2", "n1")
	_, err = n1.manifest(t, item1.Digest)
	wantCode(t, err, protocol.Unknown)
	asked[struct{}](t, admin, protocol.RemoveNode, protocol.NameRequest{Name: "n2"})
	_, err = n2.manifest(t, "")
	wantCode(t, err, protocol.Unknown)
}

func TestAuditChainOverRestart(t *testing.T) {
	r := startRig(t)
	vera := r.person("vera", protocol.Viewer)
	asked[protocol.NodeList](t, vera, protocol.ListNodes, nil)
	r.restart()
	vera = r.person("vera", protocol.Viewer)
	asked[protocol.NodeList](t, vera, protocol.ListNodes, nil)
	var records []protocol.AuditRecord
	eventually(t, "four records", func() bool { records = r.auditRecords(t); return len(records) == 4 })
	for i, a := range records {
		want := []string{"", "ok"}[i%2]
		if a.User != "vera" || a.Role != protocol.Viewer || a.Action != protocol.ListNodes || a.Outcome != want || a.Request == "" || a.Payload == "" {
			t.Errorf("record %d: %+v", i, a)
		}
	}
}
