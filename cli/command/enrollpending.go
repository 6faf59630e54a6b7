package command

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// pendingDocument is a token that is open, or a machine that came with one, in `enroll --pending --json`.
type pendingDocument struct {
	Node     string     `json:"node"`
	State    string     `json:"state"` // open: no machine came; asks: one waits to be let in; unknown: one waits, and the token is not this project's
	Token    string     `json:"token"` // public key
	Ends     time.Time  `json:"ends"`
	Came     *time.Time `json:"came"`
	Hostname string     `json:"hostname"`
	Address  string     `json:"address"` // from where the broker saw the token, several with commas between; "": not known
	Says     string     `json:"says"`    // the address that the machine says it has
	Key      string     `json:"key"`
	Rival    string     `json:"rival"` // key of another machine that came with the same token, "" if there was none
}

// enrollPending lets in the machine that came with a node's token or, without a name, lists who waits.
func (a *app) enrollPending(ctx context.Context, name string, wait time.Duration) error {
	if name == "" {
		return a.listPending(ctx)
	}
	e, err := a.openEnrolment()
	if err != nil {
		return err
	}
	if err := e.me.mayLetIn(); err != nil {
		return err
	}
	record, err := a.readTokens()
	if err != nil {
		return err
	}
	t := record.newest(name)
	switch {
	case t == nil:
		return fmt.Errorf("no token was made for %s; make one: nix-infra enroll --token %s", name, name)
	case t.Revoked != nil:
		return fmt.Errorf("the token for %s was taken back; make another: nix-infra enroll --token %s", name, name)
	}
	s, err := a.connectAs(ctx, e.me)
	if err != nil {
		return err
	}
	defer s.Close()
	j, err := joiningOf(ctx, s, t)
	switch {
	case err != nil:
		return err
	case j == nil && !time.Now().Before(t.Ends):
		return fmt.Errorf("the token for %s ended at %s; make another: nix-infra enroll --token %s", name, t.Ends.Format(time.RFC3339), name)
	case j == nil:
		return &outcome{Unanswered, fmt.Errorf("no machine has come with the token for %s yet; it is good until %s", name, t.Ends.Format(time.RFC3339))}
	case j.User == "":
		return a.letIn(ctx, e, s, t, j, wait)
	}
	// It was signed: the run that did so ended before it heard of the machine.
	_, r, err := e.me.verifier.ProveJoin(&j.Request, name, time.Now())
	if err != nil {
		return err
	}
	if t.Machine != r.Key {
		return fmt.Errorf("the controller says that a machine with the key %s was let in by the token for %s, and it was not from here; bring the project folder up to date", r.Key, name)
	}
	a.note("%s: signed before; waiting for a sign of life", name)
	return a.awaitJoined(ctx, s, t, j, r, nil, wait)
}

func (a *app) listPending(ctx context.Context) error {
	r, err := a.readTokens()
	if err != nil {
		return err
	}
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	came, err := joinings(ctx, s)
	if err != nil {
		return err
	}
	now := time.Now()
	var list []pendingDocument
	for i := range came {
		if came[i].Pending() {
			list = append(list, s.me.pending(&came[i], r, now))
		}
	}
	for _, t := range r.Tokens {
		if t.state(now) == "open" && !slices.ContainsFunc(came, func(j protocol.Joining) bool { return j.Token == t.Key }) {
			list = append(list, pendingDocument{Node: t.Node, State: "open", Token: t.Key, Ends: t.Ends})
		}
	}
	slices.SortStableFunc(list, func(x, y pendingDocument) int { return strings.Compare(x.Node, y.Node) })
	a.showPending(list)
	return nil
}

// pending is a machine that waits. What the controller says of it counts only where the token's signature proves it.
func (me *identity) pending(j *protocol.Joining, r *tokenRecord, now time.Time) pendingDocument {
	d := pendingDocument{Node: j.Node, State: "unknown", Token: j.Token, Ends: j.Ends, Came: &j.Came, Address: j.From, Rival: j.Rival}
	id, q, err := me.verifier.ProveJoin(&j.Request, j.Node, now)
	if err != nil {
		return d
	}
	d.Hostname, d.Says, d.Key = q.Hostname, q.IPv4, q.Key
	if t := r.byKey(id.Key); id.Key == j.Token && t != nil && t.Node == j.Node && t.Revoked == nil {
		d.State = "asks"
	}
	return d
}

func (a *app) showPending(list []pendingDocument) {
	var rows [][]ui.Cell
	for _, d := range list {
		if a.json {
			a.document(d)
		}
		ended := d.Ends.Local().Format(time.DateTime)
		rows = append(rows, ui.Text(d.Node, d.State, d.Hostname, first(d.Address, d.Says), d.Key, ended, d.Rival))
	}
	switch {
	case a.json:
	case len(list) == 0:
		a.say("no token is open, and no machine waits\n")
	default:
		a.out.Table(withoutEmpty([]string{"NODE", "STATE", "HOSTNAME", "ADDRESS", "KEY", "UNTIL", "ALSO CAME"}, rows, 6))
	}
}

// revokeToken takes a token back that no machine was let in by: in the project first, where from then on nobody signs for
// it, then at the controller, which turns away who comes.
func (a *app) revokeToken(ctx context.Context, name string) error {
	if name == "" {
		return errors.New("--revoke-token needs the NAME of the node that the token is for")
	}
	me, err := a.identity()
	if err != nil {
		return err
	}
	if err := me.mayLetIn(); err != nil {
		return err
	}
	var void token
	err = a.changeTokens(func(r *tokenRecord) error {
		t := r.newest(name)
		now := time.Now().UTC().Truncate(time.Second)
		switch {
		case t == nil:
			return fmt.Errorf("no token was made for %s", name)
		case t.Used != nil:
			return fmt.Errorf("the token for %s is used; to throw its machine out: nix-infra node remove %s", name, name)
		case t.state(now) == "ended":
			return fmt.Errorf("the token for %s ended at %s by itself", name, t.Ends.Format(time.RFC3339))
		case t.Revoked == nil:
			t.Revoked = &now
		}
		void = *t
		return nil
	})
	if err != nil {
		return err
	}
	s, err := a.connectAs(ctx, me)
	if err == nil {
		defer s.Close()
		err = s.Controller(ctx, protocol.AnswerJoining, protocol.JoinAnswer{Token: void.Key, Node: name, Ends: void.Ends}, nil)
	}
	if err != nil {
		return &outcome{Unanswered, fmt.Errorf("the token for %s is taken back in the project, so that nobody can be let in by it, and the controller does not know it yet: %w; run the same command again", name, err)}
	}
	if a.json {
		a.document(revokedTokenDocument{"revoked", name, void.Key})
	}
	a.say("the token for %s is void\n", name)
	return nil
}

// revokedTokenDocument is `enroll --revoke-token --json`.
type revokedTokenDocument struct {
	Event string `json:"event"` // revoked
	Node  string `json:"node"`
	Key   string `json:"key"` // of the token
}
