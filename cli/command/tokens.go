package command

import (
	"fmt"
	"slices"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// tokensFile, beside fleet.json, is the project's record of the tokens that it made. The secret half of a token is in it
// nowhere: what a machine says is signed by it, and the record has the public half, to check that.
const tokensFile = "tokens.json"

// keepTokens is for how long a token stays on the record after it ended.
const keepTokens = 90 * 24 * time.Hour

// token is one that was made.
type token struct {
	Node    string     `json:"node"`
	Key     string     `json:"key"` // public
	Tags    []string   `json:"tags,omitempty"`
	By      string     `json:"by"`
	At      time.Time  `json:"at"`
	Ends    time.Time  `json:"ends"`
	Used    *time.Time `json:"used,omitempty"`
	Machine string     `json:"machine,omitempty"` // key of the machine that was let in by it
	Revoked *time.Time `json:"revoked,omitempty"`
}

// state of a token in a word: open, used, revoked or ended.
func (t *token) state(now time.Time) string {
	switch {
	case t.Used != nil:
		return "used"
	case t.Revoked != nil:
		return "revoked"
	case !now.Before(t.Ends):
		return "ended"
	}
	return "open"
}

// tokenRecord is tokens.json, the oldest first.
type tokenRecord struct {
	Version int     `json:"v"`
	Tokens  []token `json:"tokens"`
}

func (a *app) readTokens() (*tokenRecord, error) {
	r := &tokenRecord{Version: protocol.Version}
	return r, a.readRecord(tokensFile, r, &r.Version)
}

// changeTokens changes the record, with no other run of this program in between: many may wait for a machine each.
func (a *app) changeTokens(change func(*tokenRecord) error) error {
	return a.alone(func() error {
		r, err := a.readTokens()
		if err != nil {
			return err
		}
		if err := change(r); err != nil {
			return err
		}
		r.Tokens = slices.DeleteFunc(r.Tokens, func(t token) bool { return time.Since(t.Ends) > keepTokens })
		return a.writeRecord(tokensFile, r)
	})
}

// newest is the token for a node that was made last, nil if there is none.
func (r *tokenRecord) newest(node string) *token {
	for i := range slices.Backward(r.Tokens) {
		if r.Tokens[i].Node == node {
			return &r.Tokens[i]
		}
	}
	return nil
}

// byKey is a token by its public key, nil if there is none.
func (r *tokenRecord) byKey(key string) *token {
	for i := range r.Tokens {
		if r.Tokens[i].Key == key {
			return &r.Tokens[i]
		}
	}
	return nil
}

// useToken notes that a machine is let in by a token: from here on it is no other one's, whatever becomes of this run.
func (a *app) useToken(key, machine string, now time.Time) error {
	return a.changeTokens(func(r *tokenRecord) error {
		t := r.byKey(key)
		switch {
		case t == nil:
			return fmt.Errorf("the token is not in %s", a.own(tokensFile))
		case t.Revoked != nil:
			return fmt.Errorf("the token for %s was taken back", t.Node)
		case t.Used != nil && t.Machine != machine:
			return fmt.Errorf("the token for %s let in another machine (its key is %s), and a token is for one", t.Node, t.Machine)
		case t.Used == nil && !now.Before(t.Ends):
			return fmt.Errorf("the token for %s ended at %s; make another: nix-infra enroll --token %s", t.Node, t.Ends.UTC().Format(time.RFC3339), t.Node)
		case t.Used == nil:
			now = now.UTC().Truncate(time.Second)
			t.Used, t.Machine = &now, machine
		}
		return nil
	})
}
