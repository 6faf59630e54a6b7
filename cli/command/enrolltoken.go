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
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// Enrolment by token: the machine comes by itself, and nobody has to reach it. Here a token is made and its machine waited
// for; enrollpending.go lets in who came meanwhile, tokens.go is the project's record.

// minTokenLife is the shortest that a token may be good for.
const minTokenLife = time.Minute

// tokenDocument is a token that was made, in `enroll --token --json`. With --out, what is in the file is left out.
type tokenDocument struct {
	Event    string    `json:"event"` // token
	Node     string    `json:"node"`
	Key      string    `json:"key"` // public, by which it is known
	Ends     time.Time `json:"ends"`
	File     string    `json:"file,omitempty"`
	Token    string    `json:"token,omitempty"`
	UserData string    `json:"user_data,omitempty"` // with --cloud-init
}

// cloudInit is user-data for an image that has the agent. The token is on a tmpfs, for root alone; what the image's own
// unit makes of that file and what is run here may be done twice.
const cloudInit = `#cloud-config
write_files:
  - path: /run/nix-infra/token
    owner: root:root
    permissions: "0600"
    content: |
      %s
runcmd:
  - [env, "PATH=/run/current-system/sw/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", nix-infra-agent, join, /run/nix-infra/token]
`

func (o *enrollOptions) checkToken(name string) error {
	switch {
	case name == "":
		return errors.New("--token needs the NAME of the node that the machine is to become")
	case o.controller || o.offline || len(o.addresses) > 0:
		return errors.New("--token is a way in of its own, for nodes; it takes --expires, --tag, --out, --cloud-init, --detach and --wait")
	case o.expires < minTokenLife || o.expires > protocol.MaxTokenLife:
		return fmt.Errorf("--expires %s: a token may be good for %s to %s", o.expires, minTokenLife, protocol.MaxTokenLife)
	}
	return nil
}

// oneWay refuses a command line that means several ways of enrolling at once, or flags of one in another.
func (o *enrollOptions) oneWay() error {
	ways := 0
	for _, way := range []bool{o.token, o.pending, o.revokeToken, o.ssh != "" || o.request != ""} {
		if way {
			ways++
		}
	}
	switch {
	case ways > 1:
		return errors.New("--token, --pending, --revoke-token, --ssh and --request are different things to do; give one")
	case !o.token && (o.cloudInit || o.detach || o.out != ""):
		return errors.New("--out, --cloud-init and --detach are for --token")
	case (o.pending || o.revokeToken) && len(o.tags) > 0:
		return errors.New("--tag is given with --token, which remembers it")
	}
	return nil
}

// enrollToken makes a token, hands it out, and waits for its machine.
func (a *app) enrollToken(ctx context.Context, name string, o enrollOptions) error {
	if err := o.checkToken(name); err != nil {
		return err
	}
	e, err := a.openEnrolment()
	if err != nil {
		return err
	}
	if err := e.me.mayLetIn(); err != nil {
		return err
	}
	s, err := a.connectAs(ctx, e.me)
	if err != nil {
		return err
	}
	defer s.Close()
	before, err := known(ctx, s, name)
	if err != nil {
		return err
	}
	if before != nil {
		return fmt.Errorf("a node %s is enrolled (its key is %s); no token was made; if its machine was set up anew, remove it first: nix-infra node remove %s", name, before.Key, name)
	}
	if err := a.letTokensIn(ctx, e); err != nil {
		return err
	}
	t, err := a.makeToken(e, name, o)
	if err != nil {
		return err
	}
	if o.detach {
		a.note("the token for %s is good for one machine, until %s; let that machine in by: nix-infra enroll --pending %s", name, t.Ends.Format(time.RFC3339), name)
		return nil
	}
	a.note("the token for %s is good for one machine, until %s; waiting for it (after Ctrl-C: nix-infra enroll --pending %s)", name, t.Ends.Format(time.RFC3339), name)
	return a.awaitJoining(ctx, e, s, t, o.wait)
}

// mayLetIn refuses whose credentials would fail halfway.
func (me *identity) mayLetIn() error {
	if least := protocol.LeastRole(protocol.AnswerJoining); !me.Role.AtLeast(least) {
		return fmt.Errorf("%s is %s; tokens need %s", me.Name, me.Role, least)
	}
	return nil
}

// letTokensIn has a fleet that was made before there were tokens know them. The keys go into the vault last: a run that is
// broken off before that makes others.
func (a *app) letTokensIn(ctx context.Context, e *enrolment) error {
	changed, err := e.Keys.Complete()
	if err != nil {
		return err
	}
	// Two that do this at once may leave the keys of one in the vault, and those of the other in the account JWT.
	if known, err := e.Keys.Published(e.Public.AccountJWT); err != nil || known && !changed {
		return err
	}
	if err := a.republish(ctx, e); err != nil {
		return err
	}
	if _, err := e.me.verifier.SetAccount(e.Public.AccountJWT); err != nil {
		return err
	}
	if err := a.sendAccount(ctx, e); err != nil {
		return err
	}
	return a.vault(e.me.project.Env.Get).Put(fleetEntry, protocol.Encode(e.Keys))
}

// makeToken makes a token, notes it, and only then shows it.
func (a *app) makeToken(e *enrolment, name string, o enrollOptions) (*token, error) {
	if err := protocol.CheckControllers(e.Controllers); err != nil {
		return nil, err
	}
	now := time.Now().UTC().Truncate(time.Second)
	made, key, err := e.Keys.NewToken(name, now.Add(o.expires), e.Public.Operator, e.CA.Public(), e.Controllers)
	if err != nil {
		return nil, err
	}
	t := token{Node: name, Key: key, Tags: o.tags, By: e.me.Name, At: now, Ends: now.Add(o.expires)}
	err = a.changeTokens(func(r *tokenRecord) error {
		if old := r.newest(name); old != nil && old.state(now) == "open" {
			return fmt.Errorf("there is a token for %s already, good until %s; wait for its machine (nix-infra enroll --pending %s), or take it back first (nix-infra enroll --revoke-token %s)", name, old.Ends.Format(time.RFC3339), name, name)
		}
		r.Tokens = append(r.Tokens, t)
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := a.showToken(made.String(), &t, o); err != nil {
		return nil, errors.Join(err, a.changeTokens(func(r *tokenRecord) error {
			r.Tokens = slices.DeleteFunc(r.Tokens, func(other token) bool { return other.Key == key }) // nobody has it
			return nil
		}))
	}
	return &t, nil
}

// showToken shows a token where it was asked for.
func (a *app) showToken(text string, t *token, o enrollOptions) error {
	d := tokenDocument{Event: "token", Node: t.Node, Key: t.Key, Ends: t.Ends, File: o.out}
	out := text + "\n"
	if o.cloudInit {
		out = fmt.Sprintf(cloudInit, text)
	}
	if o.out != "" {
		if err := atomicfile.Write(o.out, []byte(out), 0o600); err != nil {
			return err
		}
	} else if d.Token = text; o.cloudInit {
		d.UserData = out
	}
	switch {
	case a.json:
		a.document(d)
	case o.out == "":
		_, err := a.Stdout.Write([]byte(out))
		return err
	default:
		a.note("%s is in %s, which is secret", map[bool]string{true: "user-data with the token", false: "the token"}[o.cloudInit], o.out)
	}
	return nil
}

// Each look for a token's machine is a request that goes on record. Who starts a machine right now waits for it; later
// somebody else does.
const (
	lookOften   = time.Second // for the first minute
	lookSeldom  = 5 * time.Second
	oftenEnough = time.Minute
)

// awaitJoining waits for a token's machine, until the token ends, and lets it in.
func (a *app) awaitJoining(ctx context.Context, e *enrolment, s *session, t *token, wait time.Duration) error {
	ended := time.NewTimer(time.Until(t.Ends))
	defer ended.Stop()
	for begun := time.Now(); ; {
		j, err := joiningOf(ctx, s, t)
		if j != nil {
			return a.letIn(ctx, e, s, t, j, wait)
		}
		if r := (&protocol.Refusal{}); errors.As(err, &r) && r.Code != protocol.Failed {
			return err
		}
		pause := lookSeldom
		if time.Since(begun) < oftenEnough {
			pause = lookOften
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
			continue
		case <-ended.C:
		}
		if err != nil {
			return &outcome{Unanswered, fmt.Errorf("whether a machine came with the token for %s is not known: %w", t.Node, err)}
		}
		return &outcome{Unanswered, fmt.Errorf("no machine came with the token for %s, which has ended", t.Node)}
	}
}

// joiningOf is what the controller has of a token's machine, nil if there is nothing.
func joiningOf(ctx context.Context, s *session, t *token) (*protocol.Joining, error) {
	all, err := joinings(ctx, s, t.Node)
	for i := range all {
		if all[i].Token == t.Key {
			return &all[i], nil
		}
	}
	return nil, err
}

// joinings are the machines that came with a token for one of the nodes or, without, for any.
func joinings(ctx context.Context, s *session, nodes ...string) ([]protocol.Joining, error) {
	var all []protocol.Joining
	page := protocol.Page{Names: nodes}
	for {
		var list protocol.JoiningList
		if err := s.Controller(ctx, protocol.ListJoinings, page, &list); err != nil {
			return nil, err
		}
		all = append(all, list.Joinings...)
		if list.Next == "" {
			return all, nil
		}
		if list.Next <= page.After {
			return nil, errors.New("the controller's list of machines with tokens goes round in circles")
		}
		page.After = list.Next
	}
}

// joinedDocument is the end of `enroll --token --json` and `enroll --pending NAME --json`.
type joinedDocument struct {
	Event    string        `json:"event"` // enrolled
	Name     string        `json:"name"`
	Role     protocol.Role `json:"role"`
	Hostname string        `json:"hostname"`
	Address  string        `json:"address"` // from where the broker saw the token, several with commas between; "": not known
	Key      string        `json:"key"`
}

// letIn makes a machine that came with a token a node, and waits for its first sign of life. Nothing is believed of the
// controller: the token's own signature is what counts. Broken off anywhere, it can be done again.
func (a *app) letIn(ctx context.Context, e *enrolment, s *session, t *token, j *protocol.Joining, wait time.Duration) error {
	now := time.Now()
	id, r, err := e.me.verifier.ProveJoin(&j.Request, t.Node, now)
	if err != nil {
		return err
	}
	if id.Key != t.Key {
		return fmt.Errorf("the request for %s came with another token than the one in %s; nothing was signed", t.Node, a.own(tokensFile))
	}
	before, err := known(ctx, s, t.Node)
	if err != nil {
		return err
	}
	if before != nil && before.Key != r.Key {
		return fmt.Errorf("a node %s with another key (%s) is enrolled meanwhile; nothing was signed", t.Node, before.Key)
	}
	void, err := protocol.Revocations(e.Public.AccountJWT)
	if err != nil {
		return err
	}
	if at, revoked := void[r.Key]; revoked {
		return fmt.Errorf("the machine that asks to be %s was thrown out at %s (its key is %s); nothing was signed", t.Node, at.Format(time.RFC3339), r.Key)
	}
	if j.Rival != "" {
		a.note("WARNING: another machine (its key is %.60q) came with the same token and was refused: one of the two has stolen it", j.Rival)
	}
	a.note("%s: %s", t.Node, ui.Clean(whoComes(j, r)))
	if err := a.useToken(t.Key, r.Key, now); err != nil {
		return err
	}
	answer, err := e.Sign(r, nil, now)
	if err != nil {
		return err
	}
	// Registered before it has its answer, so that its first beat is taken.
	if err := register(ctx, s, before, r, answer.User, "", t.Tags); err != nil {
		return notLetIn(t, err)
	}
	if err := s.Controller(ctx, protocol.AnswerJoining, protocol.JoinAnswer{Token: t.Key, Node: t.Node, User: answer.User, Ends: t.Ends}, nil); err != nil {
		return notLetIn(t, err)
	}
	a.note("%s: signed; waiting for its first sign of life", t.Node)
	return a.awaitJoined(ctx, s, t, j, r, before, wait)
}

// awaitJoined waits until a machine that was let in is heard of as the node, since before if it was known then.
func (a *app) awaitJoined(ctx context.Context, s *session, t *token, j *protocol.Joining, r *protocol.EnrolRequest, before *protocol.NodeState, wait time.Duration) error {
	err := a.await(ctx, wait, func(ctx context.Context) bool { return heard(ctx, s, t.Node, before) })
	if ctx.Err() != nil {
		return ctx.Err()
	} else if err != nil {
		return &outcome{Unanswered, fmt.Errorf("%s was signed, and in %s nothing was heard of it: %w", t.Node, wait, err)}
	}
	if a.json {
		a.document(joinedDocument{"enrolled", t.Node, protocol.Node, r.Hostname, j.From, r.Key})
	}
	a.note("%s: enrolled", t.Node)
	return nil
}

func notLetIn(t *token, err error) error {
	return &outcome{Unanswered, fmt.Errorf("%s was signed, and does not have the answer yet: %w; run nix-infra enroll --pending %s", t.Node, err, t.Node)}
}

// whoComes says what is known of a machine, of which only the key is proven.
func whoComes(j *protocol.Joining, r *protocol.EnrolRequest) string {
	address := strings.Join(strings.Fields(first(j.From, "an address that is not known")+" "+says(r.IPv4)), " ")
	return fmt.Sprintf("a machine that calls itself %q (%s) asks from %s since %s; its key is %s", r.Hostname, r.System, address, j.Came.Local().Format(time.DateTime), r.Key)
}

func says(ipv4 string) string {
	if ipv4 == "" {
		return ""
	}
	return "(it says " + ipv4 + ")"
}
