//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/e2e/lab"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
)

// raw is a plain NATS client that says what it likes.
type raw struct {
	*nats.Conn
	t          *testing.T
	violations chan string
}

// dialTime is for a connection to the broker, and its greeting.
const dialTime = 30 * time.Second

// labDialer lets nats.go dial in the lab's network.
type labDialer struct{ f *fleet }

func (d labDialer) Dial(network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(d.f.ctx, dialTime)
	defer cancel()
	return d.f.lab.Dial(ctx, network, address)
}

// raw connects to the controller's broker as signer, with any inbox.
func (f *fleet) raw(signer *protocol.Signer, inbox string) *raw {
	f.t.Helper()
	r := &raw{t: f.t, violations: make(chan string, 100)}
	to := connect.To{URLs: []string{"tls://" + f.ctl.IP + ":4222"}, CA: f.ca(), Signer: signer, Name: "raw", InboxPrefix: inbox, Timeout: dialTime}
	nc, err := to.Dial(nats.SetCustomDialer(labDialer{f}), nats.NoReconnect(), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		if errors.Is(err, nats.ErrPermissionViolation) {
			r.violations <- err.Error()
		}
	}))
	if err != nil {
		f.t.Fatal(err)
	}
	r.Conn = nc
	f.t.Cleanup(nc.Close)
	return r
}

// refused does something and wants the broker to say that it is not permitted.
func (r *raw) refused(what string, act func() error) {
	r.t.Helper()
	if err := act(); err != nil {
		r.t.Fatalf("%s: %v", what, err)
	}
	if err := r.Flush(); err != nil {
		r.t.Fatalf("%s: %v", what, err)
	}
	select {
	case <-r.violations:
	case <-time.After(soon):
		r.t.Errorf("%s: the broker lets it through", what)
	}
}

// ca is the project's CA, as enrolled machines have it.
func (f *fleet) ca() []byte {
	f.t.Helper()
	return f.enrolment(f.ctl, "/var/lib/nix-infra-controller").CA
}

func (f *fleet) enrolment(n *lab.Node, dir string) protocol.EnrolAnswer {
	f.t.Helper()
	data, err := n.ReadFile(dir + "/enrolment.json")
	if err != nil {
		f.t.Fatal(err)
	}
	a, err := protocol.Decode[protocol.EnrolAnswer](data)
	if err != nil {
		f.t.Fatal(err)
	}
	return a
}

// stolen is the identity of a machine, from its own disk.
func (f *fleet) stolen(n *lab.Node, dir string) *protocol.Signer {
	f.t.Helper()
	seed, err := n.ReadFile(dir + "/user.nk")
	if err != nil {
		f.t.Fatal(err)
	}
	key, err := nkeys.FromSeed([]byte(strings.TrimSpace(string(seed))))
	if err != nil {
		f.t.Fatal(err)
	}
	return &protocol.Signer{User: f.enrolment(n, dir).User, Key: key}
}

const (
	agentDir      = "/var/lib/nix-infra-agent"
	controllerDir = "/var/lib/nix-infra-controller"
)

// keys are the fleet's keys, from the project's vault.
func (f *fleet) keys() *protocol.FleetKeys {
	f.t.Helper()
	data := f.secret("fleet")
	var k protocol.FleetKeys
	if err := json.Unmarshal(data, &k); err != nil {
		f.t.Fatal(err)
	}
	return &k
}

// user makes a user of the fleet's, or of another fleet's.
func (f *fleet) user(keys *protocol.FleetKeys, name string, r protocol.Role, expires time.Time) *protocol.Signer {
	f.t.Helper()
	creds, err := keys.Credentials(name, r, expires)
	if err != nil {
		f.t.Fatal(err)
	}
	s, _, err := protocol.ParseCredentials(creds)
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

// auditStream reads the controller's audit stream whole.
func (f *fleet) auditStream() []protocol.AuditRecord {
	f.t.Helper()
	r := f.raw(f.stolen(f.ctl, controllerDir), protocol.ControllerInbox("ctl"))
	js, err := r.JetStream()
	if err != nil {
		f.t.Fatal(err)
	}
	info, err := js.StreamInfo("AUDIT")
	if err != nil {
		f.t.Fatal(err)
	}
	var all []protocol.AuditRecord
	for seq := info.State.FirstSeq; seq <= info.State.LastSeq && seq > 0; seq++ {
		m, err := js.GetMsg("AUDIT", seq)
		if err != nil {
			f.t.Fatal(err)
		}
		for _, data := range protocol.SplitRecords(m.Data) {
			record, err := protocol.Decode[protocol.AuditRecord](data)
			if err != nil {
				f.t.Fatal(err)
			}
			all = append(all, record)
		}
	}
	return all
}
