package controller

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// publicKey is what a revocation names.
func publicKey(t testing.TB, s *protocol.Signer) string { return value[string](t)(s.Key.PublicKey()) }

// revoked makes an account JWT that is newer than all before, without those who have these keys.
func (r *rig) revoked(keys ...string) string {
	r.t.Helper()
	for s := time.Now().Unix(); time.Now().Unix() == s; { // which is the newest is told by the second
		time.Sleep(10 * time.Millisecond)
	}
	void := map[string]time.Time{}
	for _, k := range keys {
		void[k] = time.Now()
	}
	return value[*protocol.Public](r.t)(r.keys.Publish(void)).AccountJWT
}

// mayConnect tries somebody's credentials.
func (r *rig) mayConnect(s *protocol.Signer) error {
	nc, err := r.connect(s)
	if err == nil {
		nc.Close()
	}
	return err
}

func TestRevoked(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin, bob := r.person("anna", protocol.Admin), r.person("bob", protocol.Deployer)
	nodes := r.online(admin, "n1", "gone", "away")
	looks := map[string]*nats.Subscription{}
	for _, n := range nodes {
		looks[n.name] = value[*nats.Subscription](t)(n.nc.SubscribeSync(protocol.LookSubject(n.name)))
		must(t, n.nc.FlushTimeout(patience))
	}
	nodes[2].nc.Close() // away

	asked[protocol.NodeList](t, bob, protocol.ListNodes, protocol.Page{})
	inFlight, id, err := bob.Request(protocol.ListNodes, protocol.ControllerName, protocol.Page{}, time.Now())
	must(t, err)
	account := r.revoked(publicKey(t, bob.Signer), publicKey(t, nodes[1].signer))
	reply := asked[protocol.AccountReply](t, admin, protocol.PutAccount, protocol.AccountUpdate{Account: account})
	if reply.Nodes != 3 || reply.External {
		t.Errorf("answered %+v", reply)
	}
	// They try to come back at once, as often as they may: not at all.
	eventually(t, "the broker ended the connections of the revoked", func() bool { return bob.nc.IsClosed() && nodes[1].nc.IsClosed() })
	for _, s := range []*protocol.Signer{bob.Signer, nodes[1].signer} {
		if err := r.mayConnect(s); !errors.Is(err, nats.ErrAuthRevoked) && !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("a revoked one came in again: %v", err)
		}
	}
	// What he signed before counts for nothing, whoever carries it.
	if _, err := (&person{bob.Signer, r, "anna", admin.nc}).send(protocol.ListNodes, inFlight, id); !errors.Is(err, &protocol.Refusal{Code: protocol.Revoked}) {
		t.Errorf("an order of a revoked user: %v", err)
	}
	look := func(s *nats.Subscription) protocol.Look {
		t.Helper()
		m := value[*nats.Msg](t)(s.NextMsg(patience))
		return value[protocol.Look](t)(protocol.Decode[protocol.Look](m.Data))
	}
	if l := look(looks["n1"]); l.Account != account {
		t.Error("a connected agent was not told")
	}
	// One that was away is told when it says that it is behind.
	before := value[*protocol.Public](t)(r.keys.Publish(nil))
	issued := value[*protocol.Verifier](t)(protocol.NewVerifier(before.Operator, before.AccountJWT)).Issued() - 100
	back := r.dial(nodes[2].signer, protocol.InboxPrefix("away"))
	again := value[*nats.Subscription](t)(back.SubscribeSync(protocol.LookSubject("away")))
	(&machineNode{"away", nodes[2].signer, back}).beat(t, protocol.Beat{Interval: 120, Account: issued})
	if l := look(again); l.Account != account {
		t.Error("an agent that returned was not told")
	}

	t.Run("no way back", func(t *testing.T) {
		for name, c := range map[string]struct {
			token string
			want  protocol.Code
		}{
			"an older one":        {r.c.machine.Answer.Fleet.AccountJWT, protocol.Conflict},
			"one that forgot bob": {r.revoked(publicKey(t, nodes[1].signer)), protocol.Conflict},
			"another fleet's":     {enrolled(t).revoked(), protocol.Untrusted},
			"garbage":             {"x", protocol.Untrusted},
		} {
			_, err := admin.ask(protocol.PutAccount, protocol.AccountUpdate{Account: c.token})
			if !errors.Is(err, &protocol.Refusal{Code: c.want}) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if r.c.verifier.Account() != account {
			t.Error("another account JWT is in force")
		}
	})
	t.Run("after a restart", func(t *testing.T) {
		admin.nc.Close()
		r.restart()
		if err := r.mayConnect(bob.Signer); !errors.Is(err, nats.ErrAuthRevoked) && !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("bob came in: %v", err)
		}
		if r.c.verifier.Account() != account {
			t.Error("the account JWT was forgotten")
		}
	})
}

// A controller that stood by, and one that was down, go by what another one put in force.
func TestStandbyKnowsWhoWasRevoked(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	endpoint := externalEtcd(t)
	on := func(name string) Config {
		cfg := DefaultConfig(t.TempDir())
		r.enrol(cfg.Dir, name)
		cfg.Broker.External, cfg.Etcd.External.Endpoints = []string{r.url}, []string{endpoint}
		return cfg
	}
	r.c.current.Load().stop() // it only lends its broker, which stays as it is, from here on
	first := value[*Controller](t)(Start(context.Background(), on("ctl2"), testLog()))
	await(t, first.Serving())
	second := value[*Controller](t)(Start(context.Background(), on("ctl3"), testLog()))
	down := on("ctl4")
	admin, bob := r.person("anna", protocol.Admin), r.person("bob", protocol.Viewer)
	account := r.revoked(publicKey(t, bob.Signer))
	if reply := asked[protocol.AccountReply](t, admin, protocol.PutAccount, protocol.AccountUpdate{Account: account}); !reply.External {
		t.Error("nobody says that the external broker does not know")
	}
	eventually(t, "the standby knows", func() bool { return second.verifier.Account() == account })
	must(t, first.Stop())
	await(t, second.Serving())
	third := value[*Controller](t)(Start(context.Background(), down, testLog()))
	must(t, second.Stop())
	await(t, third.Serving())
	defer third.Stop()
	if _, err := bob.ask(protocol.ListNodes, protocol.Page{}); !errors.Is(err, &protocol.Refusal{Code: protocol.Revoked}) {
		t.Errorf("the new leader: %v", err)
	}
	asked[protocol.NodeList](t, admin, protocol.ListNodes, protocol.Page{})
}

// An account JWT that somebody wrote into etcd without the operator's key changes nothing.
func TestForeignAccountInEtcd(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	known := r.c.verifier.Account()
	must(t, r.c.current.Load().lead.PutAccount(t.Context(), enrolled(t).revoked()))
	r.restart()
	if r.c.verifier.Account() != known {
		t.Fatal("it was taken over")
	}
	kept := value[string](t)(r.c.store.Account(t.Context()))
	if kept != known {
		t.Error("it still is in etcd")
	}
}

// Who is restricted to some nodes can neither order nor see anything of the others.
func TestTargets(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin, dora := r.person("anna", protocol.Admin), r.person("dora", protocol.Deployer)
	r.online(admin, "web1", "web2", "db1")
	creds := value[[]byte](t)(r.keys.Credentials("rita", protocol.Deployer, time.Time{}, "web*"))
	signer, _, err := protocol.ParseCredentials(creds)
	must(t, err)
	rita := &person{signer, r, "rita", r.dial(signer, "ni.v1.reply.rita")}

	dora.deploy(t, "d-both", 1, "web1", "db1")
	dora.deploy(t, "d-db", 2, "db1")
	db := dora.show(t, "d-db").Nodes["db1"]
	rita.deploy(t, "d-web", 2, "web1", "web2")

	var names []string
	for _, n := range asked[protocol.NodeList](t, rita, protocol.ListNodes, protocol.Page{}).Nodes {
		names = append(names, n.Name)
	}
	if !slices.Equal(names, []string{"web1", "web2"}) {
		t.Errorf("she sees %v", names)
	}
	if l := asked[protocol.NodeList](t, rita, protocol.ListNodes, protocol.Page{Names: []string{"db1"}}); len(l.Nodes) > 0 {
		t.Error("she sees db1 by its name")
	}
	var seen []string
	for _, d := range asked[protocol.DeploymentList](t, rita, protocol.ListDeployments, protocol.Page{}).Deployments {
		seen = append(seen, d.ID)
	}
	if !slices.Equal(seen, []string{"d-web", "d-both"}) {
		t.Errorf("she sees %v", seen)
	}
	if d := rita.show(t, "d-both"); len(d.Nodes) != 1 || d.Nodes["web1"].Serial == 0 {
		t.Errorf("of a deployment to others, too, she sees %v", d.Nodes)
	}
	item, blob := rita.signedManifest(t, "db1", "d-bad", 9, protocol.Switch, "hers")
	back := protocol.DeployItem{Node: "db1", Serial: 9, Digest: item.Digest}
	for name, c := range map[string]struct {
		action  protocol.Action
		payload any
		want    protocol.Code
	}{
		"deploy":                  {protocol.Deploy, protocol.DeployRequest{Deployment: "d-bad", Mode: protocol.Switch, Items: []protocol.DeployItem{back}}, protocol.OffTarget},
		"tag":                     {protocol.TagNode, protocol.TagsRequest{Node: "db1", Tags: []string{"web"}}, protocol.OffTarget},
		"lock":                    {protocol.LockNode, protocol.LockRequest{Node: "db1", Reason: "mine"}, protocol.OffTarget},
		"steer":                   {protocol.SteerRollout, protocol.RolloutOrder{ID: "d-both", Verb: protocol.AbortRollout}, protocol.OffTarget},
		"show a manifest":         {protocol.ShowManifest, protocol.ManifestRequest{Node: "db1"}, protocol.OffTarget},
		"show a blob":             {protocol.ShowBlob, protocol.BlobRequest{Node: "db1", BlobQuery: protocol.BlobQuery{Manifest: item.Digest, Blob: blob}}, protocol.OffTarget},
		"show a deployment":       {protocol.ShowDeployment, protocol.DeploymentQuery{ID: "d-db"}, protocol.Unknown},
		"tag a node that is hers": {protocol.TagNode, protocol.TagsRequest{Node: "web1", Tags: []string{"web"}}, ""},
		"lock it":                 {protocol.LockNode, protocol.LockRequest{Node: "web1", Reason: "mine"}, ""},
		"show its manifest":       {protocol.ShowManifest, protocol.ManifestRequest{Node: "web1"}, ""},
	} {
		_, err := rita.ask(c.action, c.payload)
		if c.want == "" && err != nil || c.want != "" && !errors.Is(err, &protocol.Refusal{Code: c.want}) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if n := r.state(t, admin, "db1"); len(n.Tags) > 0 || n.Lock != nil || n.Serial != db.Serial {
		t.Errorf("db1 is %+v", n)
	}
}

// Every action of the controller, by every role: the broker or the controller refuses exactly what the table says.
func TestRoles(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	r.node(r.person("anna", protocol.Admin), "n1")
	for _, role := range protocol.Roles {
		s := r.signer("x"+string(role), role)
		nc := r.dial(s, "ni.v1.reply.x"+string(role))
		p := &person{s, r, "x" + string(role), nc}
		for action := range r.c.current.Load().actions() {
			may := role.AtLeast(protocol.LeastRole(action))
			signed, id, err := p.Request(action, protocol.ControllerName, nil, time.Now())
			must(t, err)
			t.Run(fmt.Sprintf("%s by %s", action, role), func(t *testing.T) {
				if role.AtLeast(protocol.Viewer) {
					// The same order, by a subject that the role may publish on: the controller goes by the action.
					_, err := p.sendRaw("ni.v1.ctl.req.viewer", protocol.Encode(signed), id)
					over := errors.Is(err, &protocol.Refusal{Code: protocol.OverRole})
					if over == may {
						t.Errorf("the controller: %v", err)
					}
				}
				denied := r.denied(t, s, protocol.RequestSubject(protocol.ControllerName, action))
				if denied == may {
					t.Errorf("the broker denied it: %v", denied)
				}
			})
		}
	}
}

// denied tells whether the broker refuses somebody a subject.
func (r *rig) denied(t *testing.T, s *protocol.Signer, subject string) bool {
	t.Helper()
	nc := value[*nats.Conn](t)(r.connect(s))
	defer nc.Close()
	must(t, nc.Publish(subject, []byte("{}")))
	must(t, nc.FlushTimeout(patience)) // the broker's complaint comes before its answer to this
	err := nc.LastError()
	if err != nil && !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("%s: %v", subject, err)
	}
	return err != nil
}

func TestShowAudit(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin, vera := r.person("anna", protocol.Admin), r.person("vera", protocol.Viewer)
	n1 := r.node(admin, "n1")
	prev := ""
	write := func(records ...protocol.AuditRecord) {
		var lines [][]byte
		for _, record := range records {
			record.Version, record.At, record.Prev = 1, "n1", prev
			lines = append(lines, protocol.Encode(record))
			prev = protocol.Digest(lines[len(lines)-1])
		}
		must(t, n1.nc.Publish(protocol.UpSubject("n1", protocol.UpAudit), protocol.JoinRecords(lines)))
	}
	old := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for i := range 3000 {
		write(protocol.AuditRecord{Seq: uint64(i + 1), Time: old.Add(time.Duration(i) * time.Minute), User: "bob", Action: protocol.Ping, Outcome: "ok", Reason: string(make([]byte, 300))})
	}
	// Three to a message, of which one was refused.
	write(protocol.AuditRecord{Seq: 3001, Time: old, User: "carol", Action: protocol.Ping, Outcome: "ok"},
		protocol.AuditRecord{Seq: 3002, Time: old, User: "bob", Action: protocol.Deploy, Outcome: string(protocol.OverRole)},
		protocol.AuditRecord{Seq: 3003, Time: old, User: "carol", Action: protocol.Ping, Outcome: "ok"})
	must(t, n1.nc.Publish(protocol.UpSubject("n1", protocol.UpAudit), []byte("damage")))
	must(t, n1.nc.FlushTimeout(patience))
	vera.ask(protocol.TagNode, protocol.TagsRequest{Node: "n1"})

	read := func(q protocol.AuditQuery) (all []protocol.StoredRecord, pages int) {
		t.Helper()
		bounds := asked[protocol.AuditPage](t, admin, protocol.ShowAudit, protocol.AuditQuery{})
		q.From, q.To = 1, bounds.Last+1
		for q.From != 0 {
			reply, err := admin.ask(protocol.ShowAudit, q)
			must(t, err)
			if len(reply.Body) > protocol.MaxMessage/2 {
				t.Errorf("a page of %d bytes", len(reply.Body))
			}
			var page protocol.AuditPage
			must(t, json.Unmarshal(reply.Body, &page))
			all, pages, q.From = append(all, page.Records...), pages+1, page.Next
		}
		return all, pages
	}
	all, pages := read(protocol.AuditQuery{})
	if pages < 2 {
		t.Errorf("%d records came in one page", len(all))
	}
	next, last := uint64(1), uint64(0) // the writer's numbers follow each other, and so do the stream's
	for _, s := range all {
		if s.Number != last && s.Number != last+1 {
			t.Fatalf("after number %d comes %d", last, s.Number)
		}
		last = s.Number
		if r, err := protocol.Decode[protocol.AuditRecord](s.Data); err == nil && r.At == "n1" {
			if r.Seq != next {
				t.Fatalf("record %d of n1 comes where %d should", r.Seq, next)
			}
			next++
		}
	}
	own := 0
	for _, s := range all {
		if name, writer, ok := protocol.AuditWriter(s.Subject); !ok {
			t.Errorf("a record on %s", s.Subject)
		} else if writer == "node n1" && name == "n1" {
			own++
		}
	}
	if own != 3004 {
		t.Errorf("%d records of n1", own)
	}
	denied, _ := read(protocol.AuditQuery{Denied: true, At: "n1"})
	if len(denied) != 2 || string(denied[1].Data) != "damage" { // which everybody should see
		t.Errorf("refused at n1: %d", len(denied))
	}
	early, _ := read(protocol.AuditQuery{User: "bob", Since: old, Until: old.Add(10 * time.Minute), Action: protocol.Ping})
	if len(early) != 11 {
		t.Errorf("%d records of ten minutes", len(early))
	}
	// Whatever a node says, a page stays one that can be sent, and reading comes to an end.
	for range 20 {
		must(t, n1.nc.Publish(protocol.UpSubject("n1", protocol.UpAudit), bytes.Repeat([]byte("\n"), 60<<10)))
	}
	must(t, n1.nc.FlushTimeout(patience))
	empty, _ := read(protocol.AuditQuery{At: "n1", Denied: true})
	if n := len(empty) - len(denied); n != 20*protocol.MaxAuditRecords {
		t.Errorf("%d more records", n)
	}
	for _, p := range []*person{vera, r.person("dora", protocol.Deployer)} {
		signed, id, err := p.Request(protocol.ShowAudit, protocol.ControllerName, protocol.AuditQuery{}, time.Now())
		must(t, err)
		_, err = p.sendRaw("ni.v1.ctl.req.viewer", protocol.Encode(signed), id)
		wantCode(t, err, protocol.OverRole)
	}
	if consumers := value[[]string](t)(r.readers()); len(consumers) > 0 {
		t.Errorf("the stream still has readers: %v", consumers)
	}
}

// readers are the audit stream's consumers.
func (r *rig) readers() ([]string, error) {
	names := r.c.broker.Audit.ConsumerNames(r.t.Context())
	var all []string
	for n := range names.Name() {
		all = append(all, n)
	}
	return all, names.Err()
}
