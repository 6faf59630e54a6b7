//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
)

// hostileRequests are requests to n1 that must have no effect. Each asks for the release of n1's quarantine,
// which shows if it happened.
func (f *fleet) hostileRequests(keys *protocol.FleetKeys) map[string]struct {
	signed *protocol.Signed
	want   protocol.Code
} {
	f.t.Helper()
	deployer := f.user(keys, "dora", protocol.Deployer, time.Time{})
	viewer := f.user(keys, "vera", protocol.Viewer, time.Time{})
	other, err := protocol.NewFleet("other")
	if err != nil {
		f.t.Fatal(err)
	}
	stranger := f.user(other, "dora", protocol.Admin, time.Time{})
	thief, err := nkeys.CreateUser()
	if err != nil {
		f.t.Fatal(err)
	}
	sign := func(s *protocol.Signer, change func(*protocol.Header)) *protocol.Signed {
		now := time.Now()
		h := protocol.Header{Version: protocol.Version, Kind: protocol.KindRequest, ID: protocol.NewID(), Action: protocol.Release, Target: "n1",
			NotBefore: now.Unix(), Expires: now.Add(protocol.RequestLifetime).Unix()}
		change(&h)
		signed, err := s.Sign(h, []byte(`{"name":""}`))
		if err != nil {
			f.t.Fatal(err)
		}
		return signed
	}
	same := func(*protocol.Header) {}
	unsigned := sign(deployer, same)
	unsigned.Signature = nil
	forged := sign(&protocol.Signer{User: deployer.User, Key: thief}, same)
	tampered := sign(deployer, same)
	tampered.Payload = []byte(`{"name":"/nix/store/x"}`)
	return map[string]struct {
		signed *protocol.Signed
		want   protocol.Code
	}{
		"unsigned":     {unsigned, protocol.Unsigned},
		"forged":       {forged, protocol.Forged},
		"tampered":     {tampered, protocol.Tampered},
		"untrusted":    {sign(stranger, same), protocol.Untrusted},
		"expired":      {sign(deployer, func(h *protocol.Header) { h.NotBefore -= 600; h.Expires -= 600 }), protocol.Expired},
		"not yet":      {sign(deployer, func(h *protocol.Header) { h.NotBefore += 600; h.Expires += 600 }), protocol.NotYet},
		"misaddressed": {sign(deployer, func(h *protocol.Header) { h.Target = "n2" }), protocol.Misaddressed},
		"over role":    {sign(viewer, same), protocol.OverRole},
		"version":      {sign(deployer, func(h *protocol.Header) { h.Version = 2 }), protocol.OtherVersion},
		"no action":    {sign(deployer, func(h *protocol.Header) { h.Action = "format-disk" }), protocol.OverRole},
	}
}

// ask publishes a request as it is and gives the answer's refusal code, "" for none.
func (f *fleet) ask(r *raw, user string, signed *protocol.Signed) protocol.Code {
	f.t.Helper()
	reply := protocol.ReplySubject(user, protocol.NewID(), "n1")
	answers, err := r.SubscribeSync("ni.v1.reply.>")
	if err != nil {
		f.t.Fatal(err)
	}
	defer answers.Unsubscribe() //nolint:errcheck // the connection ends with the test
	if err := r.PublishRequest(protocol.RequestSubject("n1", protocol.Release), reply, protocol.Encode(signed)); err != nil {
		f.t.Fatal(err)
	}
	m, err := answers.NextMsg(soon)
	if err != nil {
		f.t.Fatalf("no answer: %v", err)
	}
	if sender, ok := protocol.ReplySender(m.Subject); !ok || sender != "n1" {
		f.t.Fatalf("answered on %s", m.Subject)
	}
	answer, err := protocol.Decode[protocol.Reply](m.Data)
	if err != nil {
		f.t.Fatal(err)
	}
	if answer.Refused == nil {
		return ""
	}
	if answer.Refused.Reason == "" {
		f.t.Errorf("refused as %s without a reason", answer.Refused.Code)
	}
	return answer.Refused.Code
}

// TestHostileBroker plays a broker that was broken into: it has the broker's own keys, speaks on every
// subject, and hears everything.
func TestHostileBroker(t *testing.T) {
	f := newFleet(t, "n1", "n2")
	n1 := f.nodes["n1"]
	old := f.proven("n1", "n2")
	// A quarantine that a hostile Release could lift.
	f.write("nodes/n1.nix", service("bad", failing))
	f.cli(f.deployArgs("n1")...)
	f.waitState("n1", soon, "rolled back", func(s status) bool { return s.State == "rolled-back" })
	keys := f.keys()
	legit := f.user(keys, "dora", protocol.Deployer, time.Time{})

	f.exec(f.ctl, "systemctl", "stop", "nix-infra-controller.service")
	if err := f.ctl.CopyTo(programs.evil, "/opt/evilbroker", 0o755); err != nil {
		t.Fatal(err)
	}
	f.exec(f.ctl, "systemd-run", "--unit=evilbroker", "/opt/evilbroker")
	f.eventually(soon, func() string {
		conn, err := f.lab.Dial(f.ctx, "tcp", f.ctl.IP+":4222")
		if err != nil {
			return err.Error()
		}
		conn.Close()
		return ""
	})
	r := f.raw(legit, "ni.v1.evil")
	beats, err := r.SubscribeSync(protocol.UpSubject("n1", protocol.UpBeat))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := beats.NextMsg(soon); err != nil {
		t.Fatalf("n1 did not connect to the hostile broker: %v", err)
	}
	before := f.exec(n1, "cat", agentDir+"/deploy/journal.json")

	var refused []protocol.Code
	for name, c := range f.hostileRequests(keys) {
		if got := f.ask(r, "dora", c.signed); got != c.want {
			t.Errorf("%s: answered %q, want %q", name, got, c.want)
		}
		refused = append(refused, c.want)
	}
	// A good request works once: replayed, it is refused.
	ping, _, err := legit.Request(protocol.Ping, "n1", nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if got := f.ask(r, "dora", ping); got != "" {
		t.Errorf("a good request was refused: %s", got)
	}
	if got := f.ask(r, "dora", ping); got != protocol.Replayed {
		t.Errorf("a replayed request: answered %q", got)
	}
	// … and by an agent that was started anew, too.
	f.exec(n1, "systemctl", "restart", "nix-infra-agent.service")
	f.eventually(soon, func() string { // READY comes before the connection
		if _, err := r.Request(protocol.RequestSubject("n1", protocol.Ping), protocol.Encode(ping), time.Second); errors.Is(err, nats.ErrNoResponders) {
			return "n1 did not come back"
		}
		return ""
	})
	if got := f.ask(r, "dora", ping); got != protocol.Replayed {
		t.Errorf("a request replayed to a new agent: answered %q", got)
	}
	if after := f.exec(n1, "cat", agentDir+"/deploy/journal.json"); after != before {
		t.Errorf("hostile requests changed the journal:\n%s\n%s", before, after)
	}

	f.hostileManifests(r, keys)
	if got := f.running(n1); got != old["n1"] {
		t.Errorf("n1 runs %s, want %s", got, old["n1"])
	}
	log := f.exec(n1, "journalctl", "-u", "nix-infra-agent.service", "-o", "cat", "--no-pager")
	for _, code := range append(refused, protocol.Replayed, protocol.Outdated) {
		if !strings.Contains(log, string(code)) {
			t.Errorf("the node's journal has no record of a request refused as %s", code)
		}
	}

	// Back to the real controller: the audit record arrives there, and the fleet works as before.
	f.exec(f.ctl, "systemctl", "stop", "evilbroker.service")
	f.exec(f.ctl, "systemctl", "start", "nix-infra-controller.service")
	f.waitState("n1", soon, "online", func(s status) bool { return s.Online })
	f.eventually(soon, func() string {
		records := f.auditStream()
		for _, code := range append(refused, protocol.Replayed) {
			if !slices.ContainsFunc(records, func(a protocol.AuditRecord) bool { return a.At == "n1" && a.Outcome == string(code) }) {
				return fmt.Sprintf("no audit record of a request refused as %s in %d records", code, len(records))
			}
		}
		return ""
	})
	if r := f.cli(f.deployArgs("n1")...); r.code != 1 || !strings.Contains(r.out+r.errOut, "quarantine") {
		t.Errorf("the quarantine did not hold: %v", r)
	}
	f.write("nodes/n1.nix", service("good again", ""))
	f.must(f.deployArgs("n1")...)
}

// hostileManifests has n1 look at manifests that it must refuse, the last of them a good one with bad blobs.
func (f *fleet) hostileManifests(r *raw, keys *protocol.FleetKeys) {
	f.t.Helper()
	deployer, viewer := f.user(keys, "dora", protocol.Deployer, time.Time{}), f.user(keys, "vera", protocol.Viewer, time.Time{})
	content := []byte("{ }")
	sign := func(s *protocol.Signer, change func(*protocol.Manifest)) []byte {
		m := &protocol.Manifest{Version: protocol.Version, Node: "n1", Serial: 99, Deployment: "hostile", Created: time.Now(), Mode: protocol.Switch,
			Files:   []protocol.File{{Path: "flake.nix", SHA256: protocol.Digest(content), Size: int64(len(content))}},
			Timeout: 30, BuildTimeout: 30}
		change(m)
		m.Attr = protocol.SystemAttr(m.Node)
		doc, err := s.Manifest(m)
		if err != nil {
			f.t.Fatal(err)
		}
		return doc
	}
	same := func(*protocol.Manifest) {}
	other, err := protocol.NewFleet("other")
	if err != nil {
		f.t.Fatal(err)
	}
	good := sign(deployer, same)
	unsigned, err := protocol.Decode[protocol.Signed](good)
	if err != nil {
		f.t.Fatal(err)
	}
	unsigned.Signature = nil
	tampered, err := protocol.Decode[protocol.Signed](good)
	if err != nil {
		f.t.Fatal(err)
	}
	tampered.Payload = []byte(strings.Replace(string(tampered.Payload), `"flake.nix"`, `"flake.nax"`, 1))

	// The node's own record, in its journal: this broker acknowledges nothing.
	recorded := func() []string {
		log := f.exec(f.nodes["n1"], "journalctl", "-u", "nix-infra-agent.service", "-o", "cat", "--no-pager", "--grep", "^audit: deploy by")
		return strings.Split(log, "\n")
	}
	asked := make(chan struct{}, 100)
	blobs, err := r.Subscribe(protocol.UpSubject("n1", protocol.UpBlob), func(m *nats.Msg) {
		asked <- struct{}{}
		answer := protocol.Answer(protocol.ControllerName, protocol.BlobReply{Size: 9, Data: []byte("not zstd!")}, nil)
		m.Respond(protocol.Encode(answer)) //nolint:errcheck // the agent asks again
	})
	if err != nil {
		f.t.Fatal(err)
	}
	defer blobs.Unsubscribe() //nolint:errcheck // the connection ends with the test
	for _, c := range []struct {
		name string
		doc  []byte
		want protocol.Code
	}{
		{"unsigned", protocol.Encode(unsigned), protocol.Unsigned},
		{"tampered", protocol.Encode(tampered), protocol.Tampered},
		{"another fleet's", sign(f.user(other, "dora", protocol.Admin, time.Time{}), same), protocol.Untrusted},
		{"a viewer's", sign(viewer, same), protocol.OverRole},
		{"another node's", sign(deployer, func(m *protocol.Manifest) { m.Node = "n2" }), protocol.Misaddressed},
		{"an old one", sign(deployer, func(m *protocol.Manifest) { m.Serial = 1 }), protocol.Outdated},
		{"with bad blobs", good, ""}, // begins, and can't get what it was promised
	} {
		manifests, err := r.Subscribe(protocol.UpSubject("n1", protocol.UpManifest), func(m *nats.Msg) {
			answer := protocol.Answer(protocol.ControllerName, protocol.ManifestReply{Digest: protocol.Digest(c.doc), Manifest: c.doc}, nil)
			m.Respond(protocol.Encode(answer)) //nolint:errcheck // the agent asks again
		})
		if err != nil {
			f.t.Fatal(err)
		}
		before := len(recorded())
		look := protocol.Look{Version: protocol.Version, Serial: 99, Digest: protocol.Digest(c.doc)}
		if err := r.Publish(protocol.LookSubject("n1"), protocol.Encode(look)); err != nil {
			f.t.Fatal(err)
		}
		f.eventually(soon, func() string {
			for _, line := range recorded()[before:] {
				if c.want == "" && strings.HasSuffix(line, ": begins") || strings.Contains(line, ": "+string(c.want)+": ") {
					return ""
				}
			}
			return fmt.Sprintf("%s: not recorded as %s", c.name, c.want)
		})
		if c.want == "" {
			for range 2 { // asked again: the first answer was not believed
				select {
				case <-asked:
				case <-time.After(soon):
					f.t.Fatalf("%s: n1 does not ask for them", c.name)
				}
			}
		}
		if err := manifests.Unsubscribe(); err != nil {
			f.t.Fatal(err)
		}
	}
}

// TestPrivateTrees plays a node that wants another node's files.
func TestPrivateTrees(t *testing.T) {
	f := newFleet(t, "n1", "n2")
	for _, n := range []string{"n1", "n2"} {
		f.write("nodes/"+n+".nix", service("private to "+n, ""))
	}
	f.must("deploy", "all", "--timeout", "60s", "--settle", "1s", "--batch")

	// What n1 may have, asked by n1 itself.
	victim := f.raw(f.stolen(f.nodes["n1"], agentDir), protocol.InboxPrefix("n1"))
	manifest := func(r *raw, as, digest string) (protocol.ManifestReply, *protocol.Refusal) {
		return request[protocol.ManifestReply](r, protocol.UpSubject(as, protocol.UpManifest), protocol.ManifestQuery{Digest: digest})
	}
	theirs, no := manifest(victim, "n1", "")
	if no != nil {
		t.Fatalf("n1 can't have its own manifest: %v", no)
	}
	private := privateBlob(t, theirs.Manifest, "n1.nix")
	if b, no := request[protocol.BlobReply](victim, protocol.UpSubject("n1", protocol.UpBlob), protocol.BlobQuery{Manifest: theirs.Digest, Blob: private}); no != nil || b.Size == 0 {
		t.Fatalf("n1 can't have its own file: %v", no)
	}

	thief := f.raw(f.stolen(f.nodes["n2"], agentDir), protocol.InboxPrefix("n2"))
	own, no := manifest(thief, "n2", "")
	if no != nil {
		t.Fatal(no)
	}
	if own.Digest == theirs.Digest {
		t.Fatal("the nodes have the same manifest: this test shows nothing")
	}
	if _, no := manifest(thief, "n2", theirs.Digest); no == nil {
		t.Error("n2 got n1's manifest by its digest")
	}
	for _, q := range []protocol.BlobQuery{
		{Manifest: theirs.Digest, Blob: private},
		{Manifest: own.Digest, Blob: private},
		{Manifest: own.Digest, Blob: theirs.Digest}, // a manifest is a blob, too
		{Manifest: private, Blob: private},
		{Blob: private},
	} {
		if _, no := request[protocol.BlobReply](thief, protocol.UpSubject("n2", protocol.UpBlob), q); no == nil {
			t.Errorf("n2 got n1's file by %+v", q)
		}
	}
	for _, s := range []string{">", "ni.>", "ni.v1.node.n1.>", "ni.v1.node.*.down.>", protocol.InboxPrefix("n1") + ".x", "_INBOX.>", "$O.>", "$O.blobs.C.>", "$JS.>",
		"ni.v1.node.n1.req.*", "ni.v1.reply.>", protocol.ControllerInbox("ctl") + ".>"} {
		thief.refused("subscribing to "+s, func() error { _, err := thief.SubscribeSync(s); return err })
	}
	inbox := thief.NewRespInbox()
	for subject, body := range map[string]string{
		protocol.UpSubject("n1", protocol.UpManifest): `{}`,
		protocol.UpSubject("n1", protocol.UpBeat):     `{}`,
		protocol.ReplySubject("admin", "x", "n1"):     `{}`,
		"$JS.API.INFO":                                        ``,
		"$JS.API.STREAM.MSG.GET.OBJ_blobs":                    `{"seq":1}`,
		"$JS.API.DIRECT.GET.OBJ_blobs":                        `{"seq":1}`,
		"$JS.API.DIRECT.GET.OBJ_blobs.$O.blobs.C.x":           ``,
		"$JS.API.CONSUMER.CREATE.OBJ_blobs":                   `{"stream_name":"OBJ_blobs","config":{"deliver_subject":"` + inbox + `"}}`,
		"$JS.API.STREAM.PURGE.OBJ_blobs":                      ``,
		"$JS.API.STREAM.CREATE.thief":                         `{"name":"thief","sources":[{"name":"OBJ_blobs"}]}`,
		"$O.blobs.C.x":                                        `x`,
		protocol.RequestSubject("n1", protocol.Ping):          `{}`,
		protocol.RequestSubject("_controller", protocol.Ping): `{}`,
	} {
		thief.refused("publishing on "+subject, func() error { return thief.PublishRequest(subject, inbox, []byte(body)) })
	}
	// The answer can't be sent to somebody else either: n1's inbox as the reply subject of n2's request.
	stray, err := victim.SubscribeSync(protocol.InboxPrefix("n1") + ".stray")
	if err != nil {
		t.Fatal(err)
	}
	if err := victim.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := thief.PublishRequest(protocol.UpSubject("n2", protocol.UpManifest), protocol.InboxPrefix("n1")+".stray", []byte(`{}`)); err != nil {
		t.Fatal(err)
	}
	if _, no := manifest(thief, "n2", ""); no != nil { // answered after the stray one
		t.Fatal(no)
	}
	if m, err := stray.NextMsg(500 * time.Millisecond); err == nil {
		t.Errorf("the controller sent n1 what n2 asked for: %s", m.Data)
	}
}

// request asks the controller as a node does.
func request[T any](r *raw, subject string, query any) (T, *protocol.Refusal) {
	r.t.Helper()
	var none T
	m, err := r.Request(subject, protocol.Encode(query), soon)
	if err != nil {
		r.t.Fatalf("%s: %v", subject, err)
	}
	reply, err := protocol.Decode[protocol.Reply](m.Data)
	if err != nil {
		r.t.Fatal(err)
	}
	if reply.Refused != nil {
		return none, reply.Refused
	}
	body, err := protocol.Decode[T](reply.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return body, nil
}

// privateBlob is the digest of a file in a signed manifest.
func privateBlob(t *testing.T, doc []byte, path string) string {
	t.Helper()
	signed, err := protocol.Decode[protocol.Signed](doc)
	if err != nil {
		t.Fatal(err)
	}
	m, err := protocol.Decode[protocol.Manifest](signed.Payload)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range m.Files {
		if file.Path == path {
			return file.SHA256
		}
	}
	t.Fatalf("%s is not in the manifest", path)
	return ""
}
