package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/nix-infra/nix-infra/protocol"
)

// newcomer is a machine with a token: a connection and keys of its own.
type newcomer struct {
	*protocol.EnrolRequest
	token *protocol.Token
	key   string // of the token
	nc    *nats.Conn
}

// made makes a token.
func (r *rig) made(name string, ends time.Time) *protocol.Token {
	r.t.Helper()
	token, _, err := r.keys.NewToken(name, ends, value[*protocol.Public](r.t)(r.keys.Publish(nil)).Operator, r.ca, []string{"tls://127.0.0.1:4222"})
	must(r.t, err)
	return token
}

// comes has a new machine come with a token.
func (r *rig) comes(token *protocol.Token) *newcomer {
	r.t.Helper()
	signer, key, err := token.Signer()
	must(r.t, err)
	return &newcomer{keysOf(r.t, token.Node), token, key, r.dial(signer, protocol.JoinInbox(token.Node, key))}
}

// keysOf is what a machine with new keys says to become a node.
func keysOf(t testing.TB, name string) *protocol.EnrolRequest {
	t.Helper()
	pair, curve := value[nkeys.KeyPair](t)(nkeys.CreateUser()), value[nkeys.KeyPair](t)(nkeys.CreateCurveKeys())
	e := &protocol.EnrolRequest{Version: 1, Role: protocol.Node, Name: name, Key: value[string](t)(pair.PublicKey()),
		XKey: value[string](t)(curve.PublicKey()), Hostname: "host-of-" + name, System: "x86_64-linux", Created: time.Now()}
	must(t, e.Prove(pair))
	return e
}

// ask asks what became of its request.
func (n *newcomer) ask(t testing.TB) (protocol.JoinState, error) {
	t.Helper()
	return n.say(t, protocol.Encode(value[*protocol.JoinRequest](t)(n.token.Join(n.EnrolRequest))))
}

func (n *newcomer) say(t testing.TB, data []byte) (state protocol.JoinState, err error) {
	t.Helper()
	m, err := n.nc.Request(protocol.UpSubject(n.token.Node, protocol.UpJoin), data, patience)
	if err != nil {
		return state, err
	}
	reply := value[protocol.Reply](t)(protocol.Decode[protocol.Reply](m.Data))
	if reply.Refused != nil {
		return state, reply.Refused
	}
	return state, json.Unmarshal(reply.Body, &state)
}

// answer is the operator's, for a machine.
func (r *rig) answer(n *newcomer) protocol.JoinAnswer {
	r.t.Helper()
	return protocol.JoinAnswer{Token: n.key, Node: n.token.Node, Ends: n.token.Ends(), User: value[string](r.t)(r.keys.IssueNode(n.token.Node, n.Key, n.XKey))}
}

func TestJoin(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	n := r.comes(r.made("web1", time.Now().Add(time.Hour)))
	nudged := value[*nats.Subscription](t)(n.nc.SubscribeSync(protocol.JoinNudge("web1", n.key)))
	for range 3 { // asking again changes nothing
		if s, err := n.ask(t); err != nil || s.User != "" {
			t.Fatalf("before the operator's answer: %+v, %v", s, err)
		}
	}
	thief := r.comes(n.token)
	_, err := thief.ask(t)
	wantCode(t, err, protocol.Conflict)
	if !strings.Contains(err.Error(), n.Key) {
		t.Errorf("it is not told whose the token is: %v", err)
	}

	list := asked[protocol.JoiningList](t, admin, protocol.ListJoinings, protocol.Page{})
	if len(list.Joinings) != 1 {
		t.Fatalf("the operator sees %+v", list)
	}
	j := list.Joinings[0]
	v := value[*protocol.Verifier](t)(protocol.NewVerifier(n.token.Operator, r.c.verifier.Account()))
	id, request, err := v.ProveJoin(&j.Request, "web1", time.Now())
	if err != nil || id.Key != n.key || request.Key != n.Key || !j.Pending() || j.From != "127.0.0.1" || j.Rival != thief.Key || !j.Ends.Equal(n.token.Ends()) {
		t.Errorf("the operator sees %+v of %+v: %v", j, request, err)
	}

	answer := r.answer(n)
	for name, c := range map[string]struct {
		change func(*protocol.JoinAnswer)
		want   protocol.Code
	}{
		"for the thief": {func(a *protocol.JoinAnswer) { a.User = r.answer(thief).User }, protocol.Invalid},
		"another name": {func(a *protocol.JoinAnswer) {
			a.Node, a.User = "db1", value[string](t)(r.keys.IssueNode("db1", n.Key, n.XKey))
		}, protocol.Invalid},
		"a JWT about another name": {func(a *protocol.JoinAnswer) { a.User = value[string](t)(r.keys.IssueNode("db1", n.Key, n.XKey)) }, protocol.Untrusted},
		"a person's JWT":           {func(a *protocol.JoinAnswer) { a.User = admin.User }, protocol.Untrusted},
		"a token nobody came with": {func(a *protocol.JoinAnswer) { a.Token = thief.Key }, protocol.Unknown},
		"nonsense":                 {func(a *protocol.JoinAnswer) { a.Token = "../x" }, protocol.Invalid},
	} {
		a := answer
		c.change(&a)
		if _, err := admin.ask(protocol.AnswerJoining, a); !errors.Is(err, &protocol.Refusal{Code: c.want}) {
			t.Errorf("an answer %s: %v, want %s", name, err, c.want)
		}
	}
	asked[struct{}](t, admin, protocol.AnswerJoining, answer)
	value[*nats.Msg](t)(nudged.NextMsg(patience))
	if s, err := n.ask(t); err != nil || s.User != answer.User || s.Account != r.c.verifier.Account() {
		t.Errorf("after it: %+v, %v", s, err)
	}
	_, err = thief.ask(t)
	wantCode(t, err, protocol.Conflict)

	outcomes := map[string]string{}
	for _, a := range r.auditRecords(t) {
		if a.Action == protocol.AnswerJoining && a.Outcome == "ok" && a.Detail != "web1: let in by the token "+n.key {
			t.Errorf("on record is %+v", a)
		}
		if a.Action == protocol.Join {
			outcomes[a.Outcome] += a.Reason
			if a.User != "web1" || a.Role != protocol.Joiner {
				t.Errorf("on record is %+v", a)
			}
		}
	}
	if len(outcomes) != 2 || !strings.Contains(outcomes["ok"], n.Key) || strings.Count(outcomes["ok"], "host-of") != 1 || !strings.Contains(outcomes["conflict"], thief.Key) {
		t.Errorf("on record is %v", outcomes)
	}
	t.Run("a restart", func(t *testing.T) {
		r.restart()
		again := r.comes(n.token)
		again.EnrolRequest = n.EnrolRequest
		if s, err := again.ask(t); err != nil || s.User != answer.User {
			t.Errorf("%+v, %v", s, err)
		}
		_, err := r.comes(n.token).ask(t)
		wantCode(t, err, protocol.Conflict)
	})
}

// Of machines that come with one token at the same moment, one is kept, and the operator is told that there were others.
func TestJoinRace(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	token := r.made("web1", time.Now().Add(time.Hour))
	machines := make([]*newcomer, 8)
	for i := range machines {
		machines[i] = r.comes(token)
	}
	var wg sync.WaitGroup
	errs := make([]error, len(machines))
	for i, n := range machines {
		wg.Go(func() { _, errs[i] = n.ask(t) })
	}
	wg.Wait()
	first := -1
	for i, err := range errs {
		switch {
		case err == nil && first < 0:
			first = i
		case !errors.Is(err, &protocol.Refusal{Code: protocol.Conflict}):
			t.Errorf("machine %d, when %d was taken: %v", i, first, err)
		}
	}
	if first < 0 {
		t.Fatal("none was taken")
	}
	list := asked[protocol.JoiningList](t, r.person("anna", protocol.Admin), protocol.ListJoinings, protocol.Page{})
	kept := value[protocol.EnrolRequest](t)(protocol.Decode[protocol.EnrolRequest](list.Joinings[0].Request.Request))
	if len(list.Joinings) != 1 || kept.Key != machines[first].Key || list.Joinings[0].Rival == "" {
		t.Errorf("machine %d was taken, and kept is %+v", first, list.Joinings)
	}
	for i, n := range machines {
		if _, err := n.ask(t); (err == nil) != (i == first) {
			t.Errorf("machine %d asks again: %v", i, err)
		}
	}
}

func TestJoinRefused(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	hour := time.Now().Add(time.Hour)

	t.Run("a token that has ended", func(t *testing.T) {
		signer, _, err := r.made("web1", time.Now().Add(-time.Minute)).Signer()
		must(t, err)
		if err := r.mayConnect(signer); !errors.Is(err, nats.ErrAuthorization) && !errors.Is(err, nats.ErrAuthExpired) {
			t.Errorf("it came in: %v", err)
		}
	})
	t.Run("another fleet's token", func(t *testing.T) {
		signer, _, err := enrolled(t).made("web1", hour).Signer()
		must(t, err)
		if err := r.mayConnect(signer); !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("it came in: %v", err)
		}
	})
	t.Run("a name that is taken", func(t *testing.T) {
		r.node(admin, "taken")
		_, err := r.comes(r.made("taken", hour)).ask(t)
		wantCode(t, err, protocol.Conflict)
	})
	t.Run("a machine that wants another name", func(t *testing.T) {
		n := r.comes(r.made("web1", hour))
		n.EnrolRequest = keysOf(t, "db1")
		_, err := n.ask(t)
		wantCode(t, err, protocol.Misaddressed)
	})
	t.Run("taken back before anybody came", func(t *testing.T) {
		n := r.comes(r.made("web2", hour))
		void := protocol.JoinAnswer{Token: n.key, Node: "web2", Ends: n.token.Ends()}
		asked[struct{}](t, admin, protocol.AnswerJoining, void)
		asked[struct{}](t, admin, protocol.AnswerJoining, void)
		_, err := n.ask(t)
		wantCode(t, err, protocol.Revoked)
		_, err = admin.ask(protocol.AnswerJoining, r.answer(n))
		wantCode(t, err, protocol.Conflict)
	})
	t.Run("taken back while it waits", func(t *testing.T) {
		n := r.comes(r.made("web3", hour))
		value[protocol.JoinState](t)(n.ask(t))
		asked[struct{}](t, admin, protocol.AnswerJoining, protocol.JoinAnswer{Token: n.key, Node: "web3", Ends: n.token.Ends()})
		_, err := n.ask(t)
		wantCode(t, err, protocol.Revoked)
		_, err = admin.ask(protocol.AnswerJoining, r.answer(n))
		wantCode(t, err, protocol.Conflict)
	})
	t.Run("taken back when it is used", func(t *testing.T) {
		n := r.comes(r.made("web4", hour))
		value[protocol.JoinState](t)(n.ask(t))
		asked[struct{}](t, admin, protocol.AnswerJoining, r.answer(n))
		_, err := admin.ask(protocol.AnswerJoining, protocol.JoinAnswer{Token: n.key, Node: "web4", Ends: n.token.Ends()})
		wantCode(t, err, protocol.Conflict)
	})
	t.Run("void for ever", func(t *testing.T) {
		n := r.made("web5", hour)
		_, key, err := n.Signer()
		must(t, err)
		_, err = admin.ask(protocol.AnswerJoining, protocol.JoinAnswer{Token: key, Node: "web5", Ends: time.Now().Add(time.Hour + protocol.MaxTokenLife)})
		wantCode(t, err, protocol.Invalid)
	})
	t.Run("nonsense", func(t *testing.T) {
		n := r.comes(r.made("web6", hour))
		for _, data := range [][]byte{nil, []byte("{}"), []byte("x"), make([]byte, protocol.MaxJoinRequest+1), []byte(`{"v":1,"user":"a.b.c","request":"e30=","proof":""}`)} {
			if _, err := n.say(t, data); err == nil {
				t.Errorf("%.40q was taken", data)
			}
		}
		value[protocol.JoinState](t)(n.ask(t))
	})
}

// A token's holder can ask to become the node that it names, and hear its own answers: the broker lets nothing else pass.
func TestTokensCanOnlyAsk(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	r.node(r.person("anna", protocol.Admin), "n1")
	n := r.comes(r.made("web1", time.Now().Add(time.Hour)))
	other := r.comes(r.made("web1", time.Now().Add(time.Hour)))
	signer, _, err := n.token.Signer()
	must(t, err)
	subjects := []string{
		protocol.UpSubject("n1", protocol.UpJoin), protocol.UpSubject("web1", protocol.UpBeat), protocol.UpSubject("web1", protocol.UpManifest),
		protocol.UpSubject("web1", protocol.UpAudit), protocol.UpSubject("web1", protocol.UpReport), protocol.EventSubject("web1", "d1"),
		protocol.LookSubject("n1"), protocol.LookSubject("web1"), protocol.JoinNudge("web1", other.key), protocol.JoinNudge("web1", n.key),
		protocol.ReplySubject("anna", "x", "web1"), protocol.ReplySubject("anna", "x", protocol.ControllerName),
		protocol.TunnelSubject("n1", "web1", "x"), protocol.ControllerAudit("ctl1"), "$JS.API.INFO", "$SYS.REQ.USER.INFO", "anything",
	}
	for a := range r.c.current.Load().actions() {
		subjects = append(subjects, protocol.RequestSubject(protocol.ControllerName, a), protocol.RequestSubject("n1", a), protocol.RequestSubject(protocol.Everyone, a))
	}
	for _, s := range subjects {
		if !r.denied(t, signer, s) {
			t.Errorf("it may publish on %s", s)
		}
	}
	if r.denied(t, signer, protocol.UpSubject("web1", protocol.UpJoin)) {
		t.Error("it may not ask")
	}
	for _, s := range []string{">", "ni.>", protocol.InboxPrefix("web1") + ".>", protocol.InboxPrefix("n1") + ".>", protocol.LookSubject("web1"),
		protocol.JoinInbox("web1", other.key) + ".>", protocol.JoinInbox("n1", n.key) + ".>", protocol.UpSubject("*", protocol.UpJoin),
		protocol.UpSubject("web1", protocol.UpJoin), protocol.NodeRequests("web1")[0], protocol.NodeRequests("web1")[1], protocol.ControllerRequests,
		"ni.*.reply.>", "ni.*.node.*.event.*", "_INBOX.>"} {
		if !r.deaf(t, signer, s) {
			t.Errorf("it may hear %s", s)
		}
	}
	if r.deaf(t, signer, protocol.JoinInbox("web1", n.key)+".>") {
		t.Error("it may not hear its answers")
	}
	// An answer goes to who asked, whatever they say.
	request := protocol.Encode(value[*protocol.JoinRequest](t)(n.token.Join(n.EnrolRequest)))
	heard := value[*nats.Subscription](t)(other.nc.SubscribeSync(protocol.JoinInbox("web1", other.key) + ".>"))
	must(t, other.nc.FlushTimeout(patience))
	must(t, n.nc.PublishRequest(protocol.UpSubject("web1", protocol.UpJoin), protocol.JoinInbox("web1", other.key)+".x", request))
	must(t, n.nc.PublishRequest(protocol.UpSubject("web1", protocol.UpJoin), protocol.LookSubject("web1"), request))
	value[protocol.JoinState](t)(n.ask(t)) // served after those
	if m, err := heard.NextMsg(300 * time.Millisecond); err == nil {
		t.Errorf("another token's machine was told %s", m.Data)
	}
}

// What the broker keeps for a token's holder, and takes from it, has bounds.
func TestTokensAskForLittle(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	n := r.comes(r.made("web1", time.Now().Add(time.Hour)))
	value[protocol.JoinState](t)(n.ask(t))
	for i := range 100 {
		value[*nats.Subscription](t)(n.nc.SubscribeSync(protocol.JoinInbox("web1", n.key) + ".x" + fmt.Sprint(i)))
	}
	must(t, n.nc.FlushTimeout(patience))
	if err := n.nc.LastError(); !errors.Is(err, nats.ErrMaxSubscriptionsExceeded) {
		t.Errorf("a hundred subscriptions: %v", err)
	}
	big := r.comes(n.token)
	err := big.nc.Publish(protocol.UpSubject("web1", protocol.UpJoin), make([]byte, 4*protocol.MaxJoinRequest))
	if err == nil {
		err = big.nc.FlushTimeout(patience)
	}
	if err == nil {
		t.Error("a message of any size is taken")
	}
}

// deaf tells whether the broker refuses somebody to listen to a subject.
func (r *rig) deaf(t *testing.T, s *protocol.Signer, subject string) bool {
	t.Helper()
	nc := value[*nats.Conn](t)(r.connect(s))
	defer nc.Close()
	value[*nats.Subscription](t)(nc.SubscribeSync(subject))
	must(t, nc.FlushTimeout(patience))
	err := nc.LastError()
	if err != nil && !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("%s: %v", subject, err)
	}
	return err != nil
}

// What is kept of a token goes with it, and there is a bound to what is kept.
func TestJoiningsEnd(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	n := r.comes(r.made("web1", time.Now().Add(time.Hour)))
	value[protocol.JoinState](t)(n.ask(t))
	client := r.c.store.Client()
	got := value[*clientv3.GetResponse](t)(client.Get(t.Context(), "/nix-infra/joinings/"+n.key))
	if len(got.Kvs) != 1 {
		t.Fatalf("etcd has %d keys of it", len(got.Kvs))
	}
	lease := value[*clientv3.LeaseTimeToLiveResponse](t)(client.TimeToLive(t.Context(), clientv3.LeaseID(got.Kvs[0].Lease)))
	if left := time.Duration(lease.TTL) * time.Second; left < 59*time.Minute || left > 62*time.Minute {
		t.Errorf("it is kept for %s", left)
	}

	lead := r.c.current.Load().lead
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range maxPending / 8 {
				if err := lead.PutJoining(t.Context(), protocol.Joining{Token: fmt.Sprintf("U%d-%d", w, i), Node: "x", Ends: time.Now().Add(time.Hour)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	_, err := r.comes(r.made("web2", time.Now().Add(time.Hour))).ask(t)
	wantCode(t, err, protocol.Failed) // which means: later
	if s, err := n.ask(t); err != nil || s.User != "" {
		t.Errorf("who waits already: %+v, %v", s, err)
	}
	admin := r.person("anna", protocol.Admin)
	count, page := 0, protocol.Page{}
	for {
		list := asked[protocol.JoiningList](t, admin, protocol.ListJoinings, page)
		count += len(list.Joinings)
		if list.Next == "" {
			break
		}
		page.After = list.Next
	}
	if count != maxPending+1 || len(asked[protocol.JoiningList](t, admin, protocol.ListJoinings, protocol.Page{Names: []string{"web1"}}).Joinings) != 1 {
		t.Errorf("%d are listed", count)
	}
}

// Another controller knows who came to the first one, and who was let in.
func TestJoinAtTheNextLeader(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	endpoint := externalEtcd(t)
	start := func(name string) *Controller {
		cfg := DefaultConfig(t.TempDir())
		r.enrol(cfg.Dir, name)
		cfg.Broker.External, cfg.Etcd.External.Endpoints = []string{r.url}, []string{endpoint}
		return value[*Controller](t)(Start(context.Background(), cfg, testLog()))
	}
	r.c.current.Load().stop() // it only lends its broker
	first := start("ctl2")
	await(t, first.Serving())
	second := start("ctl3")
	defer second.Stop()
	admin := r.person("anna", protocol.Admin)
	waits, used := r.comes(r.made("web1", time.Now().Add(time.Hour))), r.comes(r.made("web2", time.Now().Add(time.Hour)))
	for _, n := range []*newcomer{waits, used} {
		value[protocol.JoinState](t)(n.ask(t))
	}
	asked[struct{}](t, admin, protocol.AnswerJoining, r.answer(used))
	must(t, first.Stop())
	await(t, second.Serving())
	for _, n := range []*newcomer{waits, used} {
		_, err := r.comes(n.token).ask(t)
		wantCode(t, err, protocol.Conflict)
	}
	if s, err := used.ask(t); err != nil || s.User == "" {
		t.Errorf("the one that was let in: %+v, %v", s, err)
	}
	asked[struct{}](t, admin, protocol.AnswerJoining, r.answer(waits))
	if s, err := waits.ask(t); err != nil || s.User == "" {
		t.Errorf("the one that waited: %+v, %v", s, err)
	}
	if list := asked[protocol.JoiningList](t, admin, protocol.ListJoinings, protocol.Page{}); len(list.Joinings) != 2 || list.Joinings[0].From != "" {
		t.Errorf("listed are %+v", list.Joinings)
	}
}

// A fleet of before there were tokens takes them once it has the new account JWT, with no restart.
func TestTokensForAnOldFleet(t *testing.T) {
	t.Parallel()
	r := enrolled(t)
	delete(r.keys.Signing, protocol.Joiner)
	r.enrol(r.cfg.Dir, "ctl1")
	r.start()
	admin := r.person("anna", protocol.Admin)
	value[bool](t)(r.keys.Complete())
	token := r.made("web1", time.Now().Add(time.Hour))
	signer, _, err := token.Signer()
	must(t, err)
	if err := r.mayConnect(signer); err == nil {
		t.Fatal("the broker knows the role already: the test shows nothing")
	}
	asked[protocol.AccountReply](t, admin, protocol.PutAccount, protocol.AccountUpdate{Account: r.revoked()})
	if s, err := r.comes(token).ask(t); err != nil || s.User != "" {
		t.Errorf("%+v, %v", s, err)
	}
	asked[protocol.NodeList](t, admin, protocol.ListNodes, protocol.Page{}) // nobody was cut off by it
}
