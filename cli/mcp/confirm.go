package mcp

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// confirmFor is how long a person has to confirm something.
const confirmFor = 10 * time.Minute

// needsInput ends a handler until a person was asked.
type needsInput struct{ result *mcp.CallToolResult }

func (*needsInput) Error() string { return "a person is asked first" }

// Confirm has a person agree to what the text says is about to be done. A handler calls it before it changes anything, and
// returns its error: the handler is called once more when the answer is there, and has to come to the same text, and the
// same of what it is bound to, again: what else there is to know of the change than the person can read, such as the digest of
// what is deployed. A client that can't ask anybody is denied.
//
// From revision 2026-07-28 on, the client itself calls again, with the answer; before it, askPerson asks the client in between. Either
// way what comes back has a state with it that is signed here, over the caller, the tool, its inputs, the text, what it is bound to and
// the time: an answer is good for what was asked, and for nothing else, and once.
func (c *Call) Confirm(ctx context.Context, text string, bound ...string) error {
	if !asksPeople(ctx) {
		return fmt.Errorf("%s changes something, so a person has to confirm it, and this client can't ask one (it has no elicitation); "+
			"it can be done by hand with the nix-infra command", c.tool.Name)
	}
	text = Clean(text)
	asked := slices.Concat(bound, []string{text})
	params := &c.mcp.Params
	if params.RequestState == "" {
		state := c.state(asked, time.Now().Add(c.server.confirmFor))
		return &needsInput{server.NewInputRequestBuilder(state).Elicit(question, mcp.ElicitationParams{
			Message: text,
			RequestedSchema: map[string]any{
				"type":       "object",
				"properties": map[string]any{"confirm": map[string]any{"type": "boolean", "title": "Do it", "description": "what the message says is to be done"}},
				"required":   []string{"confirm"},
			},
		}).ToolResult()}
	}
	stamp, err := c.checkState(asked, params.RequestState)
	if err != nil {
		return err
	}
	answer := server.ElicitationResponse(params.InputResponses, question)
	if answer == nil {
		return errors.New("nothing was done: there is no answer to the confirmation that was asked for")
	}
	content, _ := answer.Content.(map[string]any)
	if yes, _ := content["confirm"].(bool); answer.Action != mcp.ElicitationResponseActionAccept || !yes {
		return errors.New("nothing was done: it was not confirmed")
	}
	if !c.server.confirmed.use(stamp, time.Now()) {
		return errors.New("nothing was done: it was confirmed once, and done then; call again to be asked")
	}
	return nil
}

// question is the name of the one thing that a client is asked for.
const question = "confirm"

// askPerson asks the client of an older revision what the result of a handler asks for, and puts the answer into the call. The tool's
// own time does not run meanwhile.
func (c *Call) askPerson(ctx context.Context, result *mcp.CallToolResult) error {
	ctx, cancel := context.WithTimeout(ctx, c.server.confirmFor)
	defer cancel()
	said, err := c.server.mcp.RequestElicitation(ctx, mcp.ElicitationRequest{
		Request: mcp.Request{Method: string(mcp.MethodElicitationCreate)}, Params: *result.InputRequests[question].Elicitation})
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("nothing was done: nobody confirmed it within %v", c.server.confirmFor)
	case err != nil:
		return fmt.Errorf("nothing was done: the client did not have it confirmed: %w", err)
	}
	c.mcp.Params.RequestState = result.RequestState
	c.mcp.Params.InputResponses = mcp.InputResponses{question: mcp.NewElicitationInputResponse(*said)}
	return nil
}

// asksPeople tells whether a client says that it can have a person fill in a form.
func asksPeople(ctx context.Context) bool {
	var can *mcp.ElicitationCapability
	if callsAgain(ctx) {
		if capabilities := server.RequestProtocolInfoFromContext(ctx).ClientCapabilities; capabilities != nil {
			can = capabilities.Elicitation
		}
	} else if session, ok := server.ClientSessionFromContext(ctx).(server.SessionWithClientInfo); ok {
		can = session.GetClientCapabilities().Elicitation
	}
	return can != nil && (can.Form != nil || can.URL == nil) // before there were two modes, there was this one
}

// callsAgain tells whether a client speaks a revision in which it calls again with what it was asked for.
func callsAgain(ctx context.Context) bool {
	info := server.RequestProtocolInfoFromContext(ctx)
	return info != nil && info.Modern
}

// stampSize is how long the beginning of a state is: the time until which an answer counts, and a number that is another one
// for each question.
const stampSize = 8 + 8

// state is such a stamp, and the signature over it and over what is asked.
func (c *Call) state(asked []string, until time.Time) string {
	stamp := make([]byte, stampSize)
	binary.BigEndian.PutUint64(stamp, uint64(until.UnixNano()))
	rand.Read(stamp[8:])
	return base64.RawURLEncoding.EncodeToString(append(stamp, c.sign(asked, stamp)...))
}

func (c *Call) sign(asked []string, stamp []byte) []byte {
	h := hmac.New(sha256.New, c.server.key)
	fields := append([]string{c.Caller.Name, string(c.Caller.Role), c.Caller.Token, c.Caller.Creds, c.Caller.Key, c.tool.Name, string(c.args), string(stamp)}, asked...)
	for _, field := range fields {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(field))))
		h.Write([]byte(field))
	}
	return h.Sum(nil)
}

// checkState gives the stamp of a state that is good for what is asked.
func (c *Call) checkState(asked []string, state string) (stamp string, err error) {
	data, err := base64.RawURLEncoding.DecodeString(state)
	if err != nil || len(data) != stampSize+sha256.Size || !hmac.Equal(data[stampSize:], c.sign(asked, data[:stampSize])) {
		return "", errors.New("nothing was done: the confirmation is for something else than what would be done now; call again to be asked")
	}
	if time.Now().UnixNano() > int64(binary.BigEndian.Uint64(data)) {
		return "", fmt.Errorf("nothing was done: the confirmation took longer than %v; call again to be asked", c.server.confirmFor)
	}
	return string(data[:stampSize]), nil
}

// confirmations are the stamps of what was confirmed. One is forgotten once it counts no more: only those that were signed here
// come in, so that they are as many as people confirmed things lately.
type confirmations struct {
	mu   sync.Mutex
	used map[string]time.Time // until when to remember
}

// use tells whether a stamp was not used yet, and notes that it is now.
func (u *confirmations) use(stamp string, now time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	maps.DeleteFunc(u.used, func(_ string, until time.Time) bool { return now.After(until) })
	if _, ok := u.used[stamp]; ok {
		return false
	}
	if u.used == nil {
		u.used = map[string]time.Time{}
	}
	u.used[stamp] = now.Add(confirmFor)
	return true
}
