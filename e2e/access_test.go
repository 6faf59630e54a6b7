//go:build linux

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
)

// grant has the CLI make credentials and gives their file, and what they are.
func (f *fleet) grant(name string, r protocol.Role, more ...string) (string, *protocol.Signer) {
	f.t.Helper()
	file := filepath.Join(f.t.TempDir(), name+".creds")
	f.must(append([]string{"access", "add", name, "--role", string(r), "--out", file}, more...)...)
	data, err := os.ReadFile(file)
	if err != nil {
		f.t.Fatal(err)
	}
	s, _, err := protocol.ParseCredentials(data)
	if err != nil {
		f.t.Fatal(err)
	}
	return file, s
}

// comesIn tells whether the controller's broker lets somebody connect.
func (f *fleet) comesIn(s *protocol.Signer) bool {
	f.t.Helper()
	to := connect.To{URLs: []string{"tls://" + f.ctl.IP + ":4222"}, CA: f.ca(), Signer: s, Name: "raw", InboxPrefix: "unused", Timeout: dialTime}
	nc, err := to.Dial(nats.SetCustomDialer(labDialer{f}), nats.NoReconnect())
	if err == nil {
		nc.Close()
		return true
	}
	if !errors.Is(err, nats.ErrAuthRevoked) && !errors.Is(err, nats.ErrAuthorization) {
		f.t.Fatal(err)
	}
	return false
}

// carried has somebody bring to a target what another one signed, and gives the answer's refusal code, "" for none.
func (f *fleet) carried(by *raw, name string, signed *protocol.Signed, target, subject string) protocol.Code {
	f.t.Helper()
	h, err := protocol.Decode[protocol.Header](signed.Header)
	if err != nil {
		f.t.Fatal(err)
	}
	reply := protocol.ReplySubject(name, h.ID, target)
	answers, err := by.SubscribeSync(reply)
	if err != nil {
		f.t.Fatal(err)
	}
	defer answers.Unsubscribe() //nolint:errcheck // the connection ends with the test
	if err := by.PublishRequest(subject, reply, protocol.Encode(signed)); err != nil {
		f.t.Fatal(err)
	}
	m, err := answers.NextMsg(soon)
	if err != nil {
		f.t.Fatalf("no answer from %s: %v", target, err)
	}
	answer, err := protocol.Decode[protocol.Reply](m.Data)
	if err != nil {
		f.t.Fatal(err)
	}
	if answer.Refused == nil {
		return ""
	}
	return answer.Refused.Code
}

func signed(t *testing.T, s *protocol.Signer, a protocol.Action, target string, payload any) *protocol.Signed {
	t.Helper()
	order, _, err := s.Request(a, target, payload, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return order
}

// TestRevoked: who is revoked is cut at once, and everybody refuses what they sign: the controller and a node that is
// connected at once, a node that was off when it is back. A node that is removed is revoked, too.
func TestRevoked(t *testing.T) {
	f := newFleet(t, "n1", "n2")
	creds, bob := f.grant("bob", protocol.Deployer)
	f.must("--creds", creds, "ping", "n1")
	live := f.raw(bob, "ni.v1.reply.bob")
	anna := f.raw(f.user(f.keys(), "anna", protocol.Admin, time.Time{}), "ni.v1.reply.anna")
	ping := func(node string) protocol.Code {
		return f.carried(anna, "anna", signed(t, bob, protocol.Ping, node, nil), node, protocol.RequestSubject(node, protocol.Ping))
	}
	f.exec(f.nodes["n2"], "systemctl", "stop", "nix-infra-agent.service")
	f.must("access", "revoke", "bob", "--batch")

	f.eventually(soon, func() string {
		if live.IsClosed() {
			return ""
		}
		return "bob is connected"
	})
	if f.comesIn(bob) {
		t.Error("bob came in again")
	}
	if r := f.cli("--creds", creds, "status"); r.code != 2 || !strings.Contains(r.errOut, "revoked") {
		t.Errorf("bob's status: %v", r)
	}
	f.eventually(soon, func() string {
		if code := ping("n1"); code != protocol.Revoked {
			return fmt.Sprintf("n1 says %q to what bob signs", code)
		}
		return ""
	})
	list := signed(t, bob, protocol.ListNodes, protocol.ControllerName, nil)
	if code := f.carried(anna, "anna", list, protocol.ControllerName, protocol.RequestSubject(protocol.ControllerName, protocol.ListNodes)); code != protocol.Revoked {
		t.Errorf("the controller says %q to what bob signs", code)
	}
	f.exec(f.nodes["n2"], "systemctl", "start", "nix-infra-agent.service")
	f.waitState("n2", soon, "back", func(s status) bool { return s.Online })
	f.eventually(soon, func() string {
		if code := ping("n2"); code != protocol.Revoked {
			return fmt.Sprintf("n2 says %q to what bob signs", code)
		}
		return ""
	})
	// A restart forgets nothing, on either side.
	f.exec(f.nodes["n1"], "systemctl", "restart", "nix-infra-agent.service")
	f.exec(f.ctl, "systemctl", "restart", "nix-infra-controller.service")
	f.waitState("n1", soon, "back", func(s status) bool { return s.Online })
	if f.comesIn(bob) {
		t.Error("bob came in after the restart of the controller")
	}

	n1 := f.stolen(f.nodes["n1"], agentDir)
	if !f.comesIn(n1) {
		t.Error("n1 could not connect before it was removed")
	}
	f.must("node", "remove", "n1")
	if f.comesIn(n1) {
		t.Error("n1 comes in after it was removed")
	}
	if _, still := f.status()["n1"]; still {
		t.Error("n1 is still in the fleet")
	}
	f.enroll("n1")
	f.waitState("n1", soon, "back", func(s status) bool { return s.Online })
}

// TestRoles asks a node and the controller for everything, as everybody. The table is the design's, not the code's.
func TestRoles(t *testing.T) {
	f := shared(t)
	keys := f.keys()
	type asked struct {
		target string
		least  protocol.Role
	}
	table := map[protocol.Action]asked{
		protocol.Ping: {"n1", protocol.Viewer}, protocol.Facts: {"n1", protocol.Viewer}, protocol.ListGenerations: {"n1", protocol.Viewer},
		protocol.Release: {"n1", protocol.Deployer}, protocol.CollectGarbage: {"n1", protocol.Deployer}, protocol.OwnFiles: {"n1", protocol.Deployer},
		protocol.ListUnits: {"n1", protocol.Viewer}, protocol.ShowUnit: {"n1", protocol.Viewer}, protocol.ReadJournal: {"n1", protocol.Viewer},
		protocol.FollowJournal: {"n1", protocol.Viewer}, protocol.ReadStats: {"n1", protocol.Viewer}, protocol.ReadFiles: {"n1", protocol.Viewer},
		protocol.Stream: {"n1", protocol.Viewer}, "format-disk": {"n1", protocol.Admin},
		protocol.RunCommand: {"n1", protocol.Viewer}, protocol.RunShell: {"n1", protocol.Admin}, protocol.RunScript: {"n1", protocol.Operator},
		protocol.OpenTunnel: {"n1", protocol.Operator}, protocol.ListSecrets: {"n1", protocol.Viewer}, protocol.RotateSecret: {"n1", protocol.Deployer},
		protocol.Rekey: {"n1", protocol.Admin},

		protocol.ListNodes: {protocol.ControllerName, protocol.Viewer}, protocol.ListDeployments: {protocol.ControllerName, protocol.Viewer},
		protocol.ShowDeployment: {protocol.ControllerName, protocol.Viewer}, protocol.ShowManifest: {protocol.ControllerName, protocol.Viewer},
		protocol.ShowBlob: {protocol.ControllerName, protocol.Viewer}, protocol.Deploy: {protocol.ControllerName, protocol.Deployer},
		protocol.MissingBlobs: {protocol.ControllerName, protocol.Deployer}, protocol.PutBlobs: {protocol.ControllerName, protocol.Deployer},
		protocol.TagNode: {protocol.ControllerName, protocol.Deployer}, protocol.LockNode: {protocol.ControllerName, protocol.Deployer},
		protocol.SteerRollout: {protocol.ControllerName, protocol.Deployer}, protocol.PutNode: {protocol.ControllerName, protocol.Admin},
		protocol.RemoveNode: {protocol.ControllerName, protocol.Admin}, protocol.PutAccount: {protocol.ControllerName, protocol.Admin},
		protocol.ShowAudit: {protocol.ControllerName, protocol.Admin}, protocol.ListJoinings: {protocol.ControllerName, protocol.Admin},
		protocol.AnswerJoining: {protocol.ControllerName, protocol.Admin}, protocol.ShowHealth: {protocol.ControllerName, protocol.Viewer},
	}
	order := []protocol.Role{protocol.Viewer, protocol.Operator, protocol.Deployer, protocol.Admin}
	for i, role := range order {
		name := "x" + string(role)
		who := f.user(keys, name, role, time.Time{})
		r := f.raw(who, "ni.v1.reply."+name)
		for action, a := range table {
			may := i >= slices.Index(order, a.least)
			// Nobody knows what this asks for, so that nothing happens where it is allowed.
			nonsense := map[string]any{"no such field": 1}
			// By a subject that everybody may publish on: who is asked goes by the action.
			by := protocol.RequestSubject(a.target, protocol.Ping)
			code := f.carried(r, name, signed(t, who, action, a.target, nonsense), a.target, by)
			if over := code == protocol.OverRole; over == may {
				t.Errorf("%s by %s: answered %q", action, role, code)
			}
			if own := protocol.RequestSubject(a.target, action); !may {
				r.refused(string(action)+" by "+string(role), func() error { return r.Publish(own, []byte("{}")) })
			}
		}
	}
	for _, role := range []protocol.Role{protocol.Node, protocol.Controller, protocol.Joiner} {
		r := f.raw(f.user(keys, "n9", role, time.Time{}), "unused")
		for action, a := range table {
			r.refused(string(action)+" by "+string(role), func() error { return r.Publish(protocol.RequestSubject(a.target, action), []byte("{}")) })
		}
	}
	if s := f.status()["n1"]; !s.Online {
		t.Errorf("n1 is %+v", s)
	}
}

// auditFinding is a document of `audit verify --json`.
type auditFinding struct {
	Event  string `json:"event"`
	Kind   string `json:"kind"`
	Fault  bool   `json:"fault"`
	Writer string `json:"writer"`
	From   uint64 `json:"from"`
	To     uint64 `json:"to"`
	Faults int    `json:"faults"`
}

// faults are what `audit verify` finds, and whether it says so by its exit status.
func (f *fleet) faults() []auditFinding {
	f.t.Helper()
	r := f.cli("audit", "verify", "--json")
	var found []auditFinding
	count := -1
	for line := range strings.Lines(r.out) {
		var d auditFinding
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			f.t.Fatalf("audit verify --json: %q: %v", line, err)
		}
		switch {
		case d.Event == "verified":
			count = d.Faults
		case d.Fault:
			found = append(found, d)
		}
	}
	if count != len(found) || (r.code == 1) != (count > 0) || r.code > 1 {
		f.t.Fatalf("audit verify: %v", r)
	}
	return found
}

// TestAuditChain: whoever has the controller's disk, and with it the record, can't take a record out or change one unseen.
func TestAuditChain(t *testing.T) {
	f := newFleet(t, "n1")
	ctl := f.raw(f.stolen(f.ctl, controllerDir), protocol.ControllerInbox("ctl"))
	n1 := f.raw(f.stolen(f.nodes["n1"], agentDir), protocol.InboxPrefix("n1"))
	js, err := ctl.JetStream()
	if err != nil {
		t.Fatal(err)
	}
	// stream is the messages of the record as they are: those of n1, and all.
	stream := func() (own []*nats.RawStreamMsg, all []*nats.RawStreamMsg) {
		t.Helper()
		info, err := js.StreamInfo("AUDIT")
		if err != nil {
			t.Fatal(err)
		}
		for seq := info.State.FirstSeq; seq <= info.State.LastSeq && seq > 0; seq++ {
			m, err := js.GetMsg("AUDIT", seq)
			if errors.Is(err, nats.ErrMsgNotFound) {
				continue
			} else if err != nil {
				t.Fatal(err)
			}
			if all = append(all, m); m.Subject == protocol.UpSubject("n1", protocol.UpAudit) {
				own = append(own, m)
			}
		}
		return own, all
	}
	var own, all []*nats.RawStreamMsg
	for range 3 {
		before := len(own)
		f.must("ping", "n1")
		f.eventually(soon, func() string {
			if own, _ = stream(); len(own) == before {
				return "the records of a ping are not in the stream"
			}
			return ""
		})
	}
	if found := f.faults(); len(found) > 0 {
		t.Fatalf("in a record that nobody touched: %+v", found)
	}
	_, all = stream()
	if denied := f.must("audit", "--denied", "--json").out; denied != "" {
		t.Errorf("refused was %s", denied)
	}
	victim := own[1]
	var lines []protocol.AuditRecord
	for _, data := range protocol.SplitRecords(victim.Data) {
		r, err := protocol.Decode[protocol.AuditRecord](data)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, r)
	}
	from, to := lines[0].Seq, lines[len(lines)-1].Seq

	if err := js.DeleteMsg("AUDIT", victim.Sequence); err != nil {
		t.Fatal(err)
	}
	found := f.faults()
	if !slices.ContainsFunc(found, func(d auditFinding) bool {
		return d.Kind == "missing" && d.Writer == "node n1" && d.From == from && d.To == to
	}) {
		t.Errorf("records %d to %d of n1 were removed, and found is %+v", from, to, found)
	}

	// Another record in its place, and all others as they were, in a stream that was filled anew.
	if err := js.PurgeStream("AUDIT"); err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		by, data := ctl, m.Data
		if m.Subject == protocol.UpSubject("n1", protocol.UpAudit) {
			by = n1
		}
		if m.Sequence == victim.Sequence {
			data = bytes.Replace(data, []byte(`"user":"`+lines[0].User+`"`), []byte(`"user":"somebody-else"`), 1)
		}
		if err := by.Publish(m.Subject, data); err != nil {
			t.Fatal(err)
		}
		if err := by.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	f.eventually(soon, func() string {
		if _, now := stream(); len(now) < len(all) {
			return fmt.Sprintf("%d of %d messages are in the stream", len(now), len(all))
		}
		return ""
	})
	found = slices.DeleteFunc(f.faults(), func(d auditFinding) bool { return d.Writer != "node n1" })
	if len(found) != 1 || found[0].Kind != "changed" || found[0].From != from {
		t.Errorf("record %d of n1 was changed, and found is %+v", from, found)
	}
}
