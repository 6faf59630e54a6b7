package protocol

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

// fuzzDecode feeds a decoder: it must never panic, and what it accepts must survive a round trip.
func fuzzDecode[T any](f *testing.F, seeds ...any) {
	for _, s := range seeds {
		f.Add(Encode(s))
	}
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"v":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Decode[T](data)
		if err != nil {
			return
		}
		if _, err := Decode[T](Encode(m)); err != nil {
			t.Fatalf("%q was accepted, but not its own encoding: %v", data, err)
		}
	})
}

func FuzzSigned(f *testing.F) {
	fl := newFleet(f)
	s := fl.signer(f, "dora", Deployer, time.Time{})
	request, _, err := s.Request(Ping, "n1", nil, now)
	must(f, err)
	doc, err := s.Manifest(manifest(func(*Manifest) {}))
	must(f, err)
	f.Add(Encode(request))
	f.Add(doc)
	for _, h := range []Header{{ID: "a.b", Target: "n1"}, {ID: "a\r\nb", Target: "n1"}, {ID: "a", Target: ">"}, {ID: "a"}} {
		h.Version, h.Kind, h.Action, h.NotBefore, h.Expires = Version, KindRequest, Ping, now.Unix(), now.Unix()
		odd, err := s.Sign(h, nil)
		must(f, err)
		f.Add(Encode(odd))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		signed, err := Decode[Signed](data)
		if err != nil {
			return
		}
		for _, k := range []Kind{KindRequest, KindManifest} {
			v, _, err := fl.verifier.Verify(&signed, Expect{Kind: k, Targets: []string{"n1"}, Now: now}, nil)
			if err == nil && (v.Sender.Name != "dora" || !isToken(v.ID)) {
				t.Fatalf("verified %q as %+v", v.ID, v.Sender)
			}
		}
		fl.verifier.Manifest(data, "n1", now) //nolint:errcheck // must only not panic
	})
}

func FuzzOwnSubjects(f *testing.F) {
	f.Add("ni.v1.node.n1.down.a")
	f.Add("ni.v1.reply.vera.x.n1")
	f.Add("ni.v1.reply.vera.x\r\n.n1")
	f.Fuzz(func(t *testing.T, reply string) {
		if (OwnInbox("n1", reply) || OwnReply("n1", reply)) && (strings.ContainsAny(reply, "*> \r\n\t\x00") || strings.Contains(reply, "..")) {
			t.Fatalf("%q can be answered on", reply)
		}
	})
}

// However a node fills a message with records, few come out of it, and nothing is lost or made up on the way.
func FuzzSplitRecords(f *testing.F) {
	f.Add([]byte("{}\n{}"), "bob\nadmin")
	f.Add([]byte(strings.Repeat("\n", 2*MaxAuditRecords)), "")
	f.Fuzz(func(t *testing.T, message []byte, claim string) {
		records := SplitRecords(message)
		if len(records) > MaxAuditRecords || !bytes.Equal(JoinRecords(records), message) {
			t.Fatalf("%d records of %q", len(records), message)
		}
		one := Encode(AuditRecord{User: claim, Reason: claim})
		if got := SplitRecords(JoinRecords([][]byte{one, one})); len(got) != 2 || !bytes.Equal(got[1], one) {
			t.Fatalf("two records with %q came as %d", claim, len(got))
		}
	})
}

func FuzzManifest(f *testing.F)      { fuzzDecode[Manifest](f, manifest(func(*Manifest) {})) }
func FuzzBeat(f *testing.F)          { fuzzDecode[Beat](f, Beat{Version: 1, Serial: 3}) }
func FuzzPong(f *testing.F)          { fuzzDecode[Pong](f, Pong{Agent: "v1"}) }
func FuzzLook(f *testing.F)          { fuzzDecode[Look](f, Look{Version: 1, Serial: 3}) }
func FuzzReply(f *testing.F)         { fuzzDecode[Reply](f, Answer("n1", Look{}, nil)) }
func FuzzEvent(f *testing.F)         { fuzzDecode[Event](f, Event{Lines: []string{"x"}}) }
func FuzzReport(f *testing.F)        { fuzzDecode[Report](f, Report{Deployment: "d", Phase: Confirmed}) }
func FuzzManifestQuery(f *testing.F) { fuzzDecode[ManifestQuery](f, ManifestQuery{Digest: "d"}) }
func FuzzManifestReply(f *testing.F) {
	fuzzDecode[ManifestReply](f, ManifestReply{Manifest: []byte("x")})
}
func FuzzBlobQuery(f *testing.F) { fuzzDecode[BlobQuery](f, BlobQuery{Offset: 1}) }
func FuzzBlobReply(f *testing.F) { fuzzDecode[BlobReply](f, BlobReply{Data: []byte("x")}) }
func FuzzBlobPieces(f *testing.F) {
	one := BlobPiece{Digest: Digest(nil), Size: 3, Offset: 1, Data: []byte("x")}
	fuzzDecode[BlobPieces](f, BlobPieces{[]BlobPiece{one, {Digest: Digest(nil)}}}, BlobPieces{}, BlobPieces{[]BlobPiece{{Digest: "x"}}})
}
func FuzzDigestList(f *testing.F)    { fuzzDecode[DigestList](f, DigestList{Digests: []string{"x"}}) }
func FuzzNodeRecord(f *testing.F)    { fuzzDecode[NodeRecord](f, NodeRecord{Name: "n1"}) }
func FuzzNodeList(f *testing.F)      { fuzzDecode[NodeList](f, NodeList{Nodes: []NodeState{{}}}) }
func FuzzPage(f *testing.F)          { fuzzDecode[Page](f, Page{After: "n1"}) }
func FuzzTagsRequest(f *testing.F)   { fuzzDecode[TagsRequest](f, TagsRequest{Node: "n1"}) }
func FuzzNameRequest(f *testing.F)   { fuzzDecode[NameRequest](f, NameRequest{Name: "n1"}) }
func FuzzDeployRequest(f *testing.F) { fuzzDecode[DeployRequest](f, DeployRequest{Deployment: "d"}) }
func FuzzDeployment(f *testing.F)    { fuzzDecode[Deployment](f, Deployment{ID: "d"}) }
func FuzzDeploymentQuery(f *testing.F) {
	fuzzDecode[DeploymentQuery](f, DeploymentQuery{ID: "d", Brief: true, Names: []string{"n1"}})
}
func FuzzDeploymentList(f *testing.F) { fuzzDecode[DeploymentList](f, DeploymentList{}) }
func FuzzAuditRecord(f *testing.F)    { fuzzDecode[AuditRecord](f, AuditRecord{Version: 1}) }
func FuzzEnrolRequest(f *testing.F)   { fuzzDecode[EnrolRequest](f, EnrolRequest{Version: 1}) }
func FuzzEnrolAnswer(f *testing.F)    { fuzzDecode[EnrolAnswer](f, EnrolAnswer{Version: 1}) }

func FuzzCommandOrder(f *testing.F) {
	fuzzDecode[CommandOrder](f, CommandOrder{Argv: []string{"uptime"}})
}
func FuzzShellOrder(f *testing.F) { fuzzDecode[ShellOrder](f, ShellOrder{Text: "uptime"}) }
func FuzzScriptOrder(f *testing.F) {
	fuzzDecode[ScriptOrder](f, ScriptOrder{Module: "hello", SHA256: Digest(nil)})
}
func FuzzTunnelOrder(f *testing.F) {
	fuzzDecode[TunnelOrder](f, TunnelOrder{To: "127.0.0.1:22", Public: make([]byte, 32)})
}
func FuzzRotateOrder(f *testing.F) {
	fuzzDecode[RotateOrder](f, RotateOrder{Secret: SealedSecret{Name: "a"}, Timeout: 1})
}
func FuzzOutput(f *testing.F) { fuzzDecode[Output](f, Output{Ended: &Ending{}}) }
