package agent

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/agent/link"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

const (
	// askEvery is how often a machine asks what became of its request, unless it is nudged before.
	askEvery = 10 * time.Second

	// askTimeout is for one answer.
	askTimeout = 15 * time.Second

	// minWait is how long is waited by a token that was never good, for whoever refuses it.
	minWait = time.Minute

	// refusedLogins is how many logins in a row may be refused: a controller may hear of a token's role a moment after
	// another one.
	refusedLogins = 3
)

// joinBackoff is for a machine that is watched while it joins.
var joinBackoff = link.Backoff{Base: time.Second, Jitter: time.Second, Cap: 15 * time.Second}

// ErrNotAnswered says that nobody let the machine in, and nobody refused it, for as long as it waited.
var ErrNotAnswered = errors.New("not let in")

// JoinOptions say how a machine becomes a node by a token.
type JoinOptions struct {
	Dir     string
	Token   *protocol.Token
	Timeout time.Duration     // for everything; 0: for as long as the token is good
	Tell    func(what string) // each step, once
}

// Join makes the machine the node that the token names: it makes its keys, asks by the token, and waits for the operator.
// Already tells that it is that node since before. What the token's fleet refuses is a *protocol.Refusal; that it did not
// answer in time is ErrNotAnswered. Broken off, it can be done again: the keys stay.
func Join(ctx context.Context, o JoinOptions) (already bool, err error) {
	home := Home(o.Dir)
	switch m, err := home.Open(); {
	case err == nil && m.Answer.Fleet.Operator != o.Token.Operator:
		return false, fmt.Errorf("this machine belongs to another operator (%s) than the token; remove %s to give it away", m.Answer.Fleet.Operator, o.Dir)
	case err == nil && m.Name != o.Token.Node:
		return false, fmt.Errorf("this machine is the node %s, and the token is for %s", m.Name, o.Token.Node)
	case err == nil:
		return true, nil
	case !errors.Is(err, machine.ErrNotEnrolled):
		return false, err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return false, err
	}
	release, err := lock(filepath.Join(o.Dir, lockFile)) // two at once would make two pairs of keys
	if err != nil {
		return false, err
	}
	defer release()
	request, err := home.Request(o.Token.Node)
	if err != nil {
		return false, err
	}
	message, err := o.Token.Join(request)
	if err != nil {
		return false, err
	}
	signer, key, err := o.Token.Signer()
	if err != nil {
		return false, err
	}
	j := &joining{JoinOptions: o, request: request, message: protocol.Encode(message), key: key, told: map[string]bool{}, to: connect.To{URLs: o.Token.Controllers,
		CA: o.Token.CAPEM(), Signer: signer, Name: "joins as " + o.Token.Node, InboxPrefix: protocol.JoinInbox(o.Token.Node, key)}}
	if j.Timeout == 0 {
		j.Timeout = max(o.Token.Life(), minWait) // when it has ended, the broker says so
	}
	answer, err := j.run(ctx)
	if err != nil {
		return false, err
	}
	_, err = home.Load(protocol.Encode(answer))
	return false, err
}

// joining is a machine that asks.
type joining struct {
	JoinOptions
	request *protocol.EnrolRequest
	message []byte
	key     string // of the token
	to      connect.To
	told    map[string]bool
	refused int  // logins, in a row
	waits   bool // a controller has the request, and that was the last that it said
}

// final is an error after which asking again is in vain.
type final struct{ error }

func (f final) Unwrap() error { return f.error }

// run connects and asks until there is an answer.
func (j *joining) run(ctx context.Context) (*protocol.EnrolAnswer, error) {
	limited, cancel := context.WithTimeout(ctx, j.Timeout)
	defer cancel()
	var last error
	for attempt := 0; ; attempt++ {
		answer, err := j.once(limited)
		if err == nil {
			return answer, nil
		}
		if f := (final{}); errors.As(err, &f) {
			return nil, f.error
		}
		if limited.Err() == nil {
			last, j.waits = err, false
			j.tell("not yet: " + err.Error())
		}
		select {
		case <-limited.Done():
		case <-time.After(joinBackoff.Delay(attempt, false)):
			continue
		}
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case j.waits:
			return nil, fmt.Errorf("%w within %s: the operator has not answered; run this again while nix-infra enroll --pending %s is run", ErrNotAnswered, j.Timeout, j.Token.Node)
		case last != nil:
			return nil, fmt.Errorf("%w within %s: %w", ErrNotAnswered, j.Timeout, last)
		}
		return nil, fmt.Errorf("%w within %s: %s did not answer", ErrNotAnswered, j.Timeout, strings.Join(j.to.URLs, ", "))
	}
}

func (j *joining) tell(what string) {
	if !j.told[what] && j.Tell != nil {
		j.Tell(what)
	}
	j.told[what] = true
}

// once asks over one connection, for as long as that lasts.
func (j *joining) once(ctx context.Context) (*protocol.EnrolAnswer, error) {
	j.tell("connect to " + strings.Join(j.to.URLs, ", "))
	lost := make(chan struct{})
	nc, err := link.Dial(ctx, j.to, nats.ClosedHandler(func(*nats.Conn) { close(lost) }))
	if err != nil {
		return nil, j.explain(err)
	}
	defer nc.Close()
	j.refused = 0
	nudges := make(chan *nats.Msg, 1)
	if _, err := nc.ChanSubscribe(protocol.JoinNudge(j.Token.Node, j.key), nudges); err != nil {
		return nil, err
	}
	for {
		answer, err := j.ask(ctx, nc)
		if answer != nil || err != nil {
			return answer, err
		}
		j.waits = true
		j.tell("wait for the operator (nix-infra enroll --pending " + j.Token.Node + "); this machine's key is " + j.request.Key)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-lost:
			return nil, fmt.Errorf("the connection was lost: %w", nc.LastError())
		case <-nudges:
		case <-time.After(askEvery):
		}
	}
}

// ask asks once. Without answer and error the operator has not answered yet.
func (j *joining) ask(ctx context.Context, nc *nats.Conn) (*protocol.EnrolAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	m, err := nc.RequestWithContext(ctx, protocol.UpSubject(j.Token.Node, protocol.UpJoin), j.message)
	if errors.Is(err, nats.ErrNoResponders) {
		return nil, errors.New("the broker is there, and no controller")
	} else if err != nil {
		return nil, fmt.Errorf("the controller does not answer: %w", err)
	}
	reply, err := protocol.Decode[protocol.Reply](m.Data)
	if err != nil {
		return nil, fmt.Errorf("the controller's answer: %w", err)
	}
	if r := reply.Refused; r != nil && r.Code == protocol.Failed {
		return nil, r // it may go better the next time
	} else if r != nil {
		return nil, final{r}
	}
	var state protocol.JoinState
	if err := json.Unmarshal(reply.Body, &state); err != nil {
		return nil, fmt.Errorf("the controller's answer: %w", err)
	}
	if state.User == "" {
		return nil, nil
	}
	answer, err := j.Token.Enrolment(&state, j.request)
	if err != nil {
		return nil, fmt.Errorf("what came as the operator's answer is not that: %w", err)
	}
	return answer, nil
}

// explain says what a connection fails with, and whether it is in vain to try again.
func (j *joining) explain(err error) error {
	var certificate *tls.CertificateVerificationError
	switch {
	case link.RefusedLogin(err):
		if ends := j.Token.Ends(); !time.Now().Before(ends) {
			return final{protocol.Refuse(protocol.Expired, "the token for %s ended at %s (this machine's clock says %s); have the operator make another: nix-infra enroll --token %s",
				j.Token.Node, ends.UTC().Format(time.RFC3339), clock(), j.Token.Node)}
		}
		j.refused++
		err := protocol.Refuse(protocol.Untrusted, "the broker does not take the token: it has ended (this machine's clock says %s), or the fleet has other keys by now; have the operator make another: nix-infra enroll --token %s",
			clock(), j.Token.Node)
		if j.refused >= refusedLogins {
			return final{err}
		}
		return err
	case errors.As(err, &certificate):
		return fmt.Errorf("what answers at %s is not the token's fleet, or this machine's clock is wrong (it says %s): %w", strings.Join(j.to.URLs, ", "), clock(), certificate.Err)
	}
	return err
}

// clock is this machine's, to the minute: what is said again and again should be the same.
func clock() string { return time.Now().UTC().Format("2006-01-02 15:04 UTC") }
