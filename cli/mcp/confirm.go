package mcp

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
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
// returns its error: the handler is called once more when the answer is there, and has to come to the same text
// again. A client that can't ask anybody is denied.
//
// From revision 2026-07-28 on, the client itself calls again, with the answer; before it, the server asks the client in between, which
// mcp-go does. Either way the client hands back a state that is signed here and bound to the caller, the tool, its inputs, the text and
// the time, so that an answer is good for what was asked and for nothing else.
func (c *Call) Confirm(ctx context.Context, text string) error {
	if !asksPeople(ctx) {
		return fmt.Errorf("%s changes something, so a person has to confirm it, and this client can't ask one (it has no elicitation); "+
			"it can be done by hand with the nix-infra command", c.tool.Name)
	}
	text = Clean(text)
	params := c.mcp.Params
	if params.RequestState == "" {
		state := c.state(text, time.Now().Add(confirmFor))
		return &needsInput{server.NewInputRequestBuilder(state).Elicit("confirm", mcp.ElicitationParams{
			Message: text,
			RequestedSchema: map[string]any{
				"type":       "object",
				"properties": map[string]any{"confirm": map[string]any{"type": "boolean", "title": "Do it", "description": "what the message says is to be done"}},
				"required":   []string{"confirm"},
			},
		}).ToolResult()}
	}
	if err := c.checkState(text, params.RequestState); err != nil {
		return err
	}
	answer := server.ElicitationResponse(params.InputResponses, "confirm")
	if answer == nil {
		return errors.New("nothing was done: there is no answer to the confirmation that was asked for")
	}
	content, _ := answer.Content.(map[string]any)
	if yes, _ := content["confirm"].(bool); answer.Action != mcp.ElicitationResponseActionAccept || !yes {
		return errors.New("nothing was done: it was not confirmed")
	}
	return nil
}

// asksPeople tells whether a client says that it can have a person fill in a form.
func asksPeople(ctx context.Context) bool {
	var can *mcp.ElicitationCapability
	if info := server.RequestProtocolInfoFromContext(ctx); info != nil && info.Modern {
		if info.ClientCapabilities != nil {
			can = info.ClientCapabilities.Elicitation
		}
	} else if session, ok := server.ClientSessionFromContext(ctx).(server.SessionWithClientInfo); ok {
		can = session.GetClientCapabilities().Elicitation
	}
	return can != nil && (can.Form != nil || can.URL == nil) // before there were two modes, there was this one
}

// state is the time until which an answer counts, and the signature over it and over what is asked.
func (c *Call) state(text string, until time.Time) string {
	stamp := binary.BigEndian.AppendUint64(nil, uint64(until.Unix()))
	return base64.RawURLEncoding.EncodeToString(append(stamp, c.sign(text, stamp)...))
}

func (c *Call) sign(text string, stamp []byte) []byte {
	h := hmac.New(sha256.New, c.server.key)
	for _, field := range [][]byte{[]byte(c.Caller.Name), []byte(c.Caller.Creds), []byte(c.tool.Name), c.args, []byte(text), stamp} {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(field))))
		h.Write(field)
	}
	return h.Sum(nil)
}

func (c *Call) checkState(text, state string) error {
	data, err := base64.RawURLEncoding.DecodeString(state)
	if err != nil || len(data) != 8+sha256.Size || !hmac.Equal(data[8:], c.sign(text, data[:8])) {
		return errors.New("nothing was done: the confirmation is for something else than what would be done now; call again to be asked")
	}
	if time.Now().Unix() > int64(binary.BigEndian.Uint64(data)) {
		return fmt.Errorf("nothing was done: the confirmation took longer than %v; call again to be asked", confirmFor)
	}
	return nil
}
