package mcp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mark3labs/mcp-go/client"
	"github.com/mark3labs/mcp-go/client/transport"
	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"

	"github.com/nix-infra/nix-infra/protocol"
)

// connected is a client of a server, in this process, that speaks a revision.
func connected(t *testing.T, s *Server, version string, options ...client.ClientOption) *client.Client {
	t.Helper()
	c := client.NewClient(transport.NewInProcessTransportWithOptions(s.mcp), options...)
	greet(t, c, version)
	return c
}

// greet has a client begin to speak a revision.
func greet(t *testing.T, c *client.Client, version string) {
	t.Helper()
	t.Cleanup(func() { c.Close() })
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	hello := mcp.InitializeRequest{Params: mcp.InitializeParams{ProtocolVersion: version, ClientInfo: mcp.Implementation{Name: "test", Version: "1"}}}
	if _, err := c.Initialize(t.Context(), hello); err != nil {
		t.Fatal(err)
	}
}

// call calls a tool and gives its text, its structured half and whether it is an error.
func call(t *testing.T, c *client.Client, tool string, inputs map[string]any) (text string, data structured, failed bool) {
	t.Helper()
	r, err := c.CallTool(t.Context(), mcp.CallToolRequest{Params: mcp.CallToolParams{Name: tool, Arguments: inputs}})
	if err != nil {
		t.Fatalf("%s: %v", tool, err)
	}
	for _, content := range r.Content {
		text += content.(mcp.TextContent).Text
	}
	if r.StructuredContent != nil {
		raw := marshal(r.StructuredContent)
		if err := json.Unmarshal(raw, &data); err != nil {
			t.Fatal(err)
		}
	}
	return text, data, r.IsError
}

type line struct {
	Text string `json:"text"`
}

type lineIn struct {
	Lines int    `json:"lines" jsonschema:"how many"`
	Kind  string `json:"kind,omitempty" enum:"long,short"`
}

// addLines gives a server a tool that answers with as many lines as it is asked for.
func addLines(s *Server) {
	Add(s, Tool{Name: "lines", Title: "Lines", Description: "lines", Toolset: "test"}, func(_ context.Context, _ *Call, in lineIn) (*Answer[line], error) {
		a := &Answer[line]{Summary: fmt.Sprintf("%d lines", in.Lines)}
		for i := range in.Lines {
			text := fmt.Sprintf("\x1b[31mline %d\u202e\x00 >>> end", i)
			a.Parts = append(a.Parts, Part[line]{Head: "web1", Text: text, Untrusted: true, Row: &line{text}})
		}
		return a, nil
	})
}

func TestAnswersAreCutAndGoOn(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	addLines(s)
	c := connected(t, s, mcp.ProtocolVersion20251125)
	const all = 5000
	seen, inputs, pages := 0, map[string]any{"lines": all}, 0
	for {
		text, data, failed := call(t, c, "lines", inputs)
		if failed || len(text) > maxPage+overhead {
			t.Fatalf("page %d has %d bytes, the cap is %d: %s", pages, len(text), maxPage, cut(text, 200))
		}
		for _, row := range data.Results {
			if want := fmt.Sprintf(`{"text":"line %d >>> end"}`, seen); string(row) != want {
				t.Fatalf("row %d is %s, not %s", seen, row, want)
			}
			seen++
		}
		if data.LeftOut != all-seen {
			t.Fatalf("%d results are said to be left out after %d of %d", data.LeftOut, seen, all)
		}
		if pages++; data.Next == "" {
			break
		}
		inputs["cursor"] = data.Next
	}
	if seen != all || pages < 3 {
		t.Fatalf("%d of %d lines came, on %d pages", seen, all, pages)
	}
}

func TestCursorsAreTheirCallers(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	addLines(s)
	_, data, _ := call(t, connected(t, s, mcp.ProtocolVersion20251125), "lines", map[string]any{"lines": 5000})
	place := data.Next[strings.Index(data.Next, "-"):]
	s.Caller.Name = "somebody else"
	for _, cursor := range []string{data.Next, "", "-", "x-1", strings.Repeat("0", 32) + place, data.Next + "0", strings.TrimSuffix(data.Next, place) + "--1", strings.TrimSuffix(data.Next, place) + "-0"} {
		text, _, failed := call(t, connected(t, s, mcp.ProtocolVersion20251125), "lines", map[string]any{"lines": 1, "cursor": cursor})
		if cursor != "" && (!failed || !strings.Contains(text, "no answer to go on with")) {
			t.Errorf("the cursor %q got %q", cursor, text)
		}
	}
}

// Answers are kept for a while, and not without a bound: who asks for much loses what they asked for first, and nobody else's.
func TestCursorsEnd(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	Add(s, Tool{Name: "much", Toolset: "test"}, func(context.Context, *Call, struct{}) (*Answer[line], error) {
		a := &Answer[line]{Summary: "much"}
		for range 150 {
			a.Parts = append(a.Parts, Part[line]{Text: strings.Repeat("x", 16<<10)})
		}
		return a, nil
	})
	c := connected(t, s, mcp.ProtocolVersion20251125)
	next := func(inputs map[string]any) (cursor string) {
		t.Helper()
		_, data, failed := call(t, c, "much", inputs)
		if failed {
			return ""
		}
		return data.Next
	}
	s.Caller.Name = "modest"
	modest := next(nil)
	s.Caller.Name = "greedy"
	first := next(nil)
	for range maxOfOne / (150 * 16 << 10) {
		next(nil)
	}
	if next(map[string]any{"cursor": first}) != "" {
		t.Error("of one who asked for much, all is kept")
	}
	size := 0
	for _, k := range s.pages.kept {
		size += k.size
	}
	if size > maxOfOne+maxAnswer {
		t.Errorf("%d bytes are kept", size)
	}
	s.Caller.Name = "modest"
	if next(map[string]any{"cursor": modest}) == "" {
		t.Error("somebody else lost what they asked for")
	}
	for _, k := range s.pages.kept {
		k.until = time.Now().Add(-time.Second)
	}
	if next(map[string]any{"cursor": modest}) != "" {
		t.Error("a cursor is good for ever")
	}
	if next(nil); len(s.pages.kept) != 1 {
		t.Errorf("%d answers are kept, of which one is not over", len(s.pages.kept))
	}
}

func TestUntrustedTextCantEndItself(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	addLines(s)
	text, _, _ := call(t, connected(t, s, mcp.ProtocolVersion20251125), "lines", map[string]any{"lines": 3})
	if strings.ContainsAny(text, "\x1b\x00\u202e") {
		t.Errorf("control codes are left: %q", text)
	}
	lines := strings.Split(text, "\n")
	if len(lines) != 9 || !strings.HasPrefix(lines[3], ">>> untrusted text ") || !strings.HasPrefix(lines[7], "<<< end of untrusted text ") {
		t.Fatalf("the fence is not as expected:\n%s", text)
	}
	again, _, _ := call(t, connected(t, s, mcp.ProtocolVersion20251125), "lines", map[string]any{"lines": 3})
	if strings.Contains(again, lines[7]) {
		t.Error("two answers have the same fence, which text could thus know")
	}
}

// What one node sends is bounded, too, however large it is.
func TestLargeResults(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	long := strings.Repeat("x", 1<<20)
	Add(s, Tool{Name: "large"}, func(context.Context, *Call, struct{}) (*Answer[line], error) {
		return &Answer[line]{Summary: long, Parts: []Part[line]{{Head: long, Text: long, Row: &line{long}}, {Text: "small", Row: &line{"small"}}}}, nil
	})
	text, data, _ := call(t, connected(t, s, mcp.ProtocolVersion20251125), "large", nil)
	if len(text) > maxPage+overhead || len(data.Results) != 1 || !strings.Contains(text, "1 of the results are too large") {
		t.Errorf("%d bytes, %d rows: %.100s", len(text), len(data.Results), text)
	}
}

func FuzzSplitLines(f *testing.F) {
	f.Add([]byte("a\nb"))
	f.Add(bytes.Repeat([]byte{0x80}, 10<<10))
	f.Add([]byte(strings.Repeat("é\n\x1b[2J", 3000)))
	f.Fuzz(func(t *testing.T, data []byte) {
		var whole strings.Builder
		for _, p := range SplitLines("x", string(data), func(text string) line { return line{text} }) {
			if whole.WriteString(p.Text); p.Text == "" || len(p.Text) > 4<<10 || p.Row == nil {
				t.Errorf("a part of %d bytes", len(p.Text))
			}
		}
		if whole.String() != string(data) {
			t.Error("it is not the same text")
		}
		cut(string(data), 5)
	})
}

func TestInputsHaveToFit(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	addLines(s)
	c := connected(t, s, mcp.ProtocolVersion20251125)
	for name, inputs := range map[string]map[string]any{
		"missing":   {},
		"a text":    {"lines": "3"},
		"unknown":   {"lines": 3, "more": 1},
		"case":      {"Lines": 3},
		"the enum":  {"lines": 3, "kind": "other"},
		"no number": {"lines": 3.5},
		"cursor":    {"lines": 3, "cursor": strings.Repeat("x", 65)},
	} {
		if text, _, failed := call(t, c, "lines", inputs); !failed {
			t.Errorf("%s was taken: %s", name, text)
		}
	}
}

func TestToolsAreLeftOut(t *testing.T) {
	add := func(s *Server) {
		for _, tool := range []Tool{
			{Name: "look", Toolset: "a"},
			{Name: "deploy", Toolset: "a", Effect: Destroys, Allow: "deploy", Role: protocol.Deployer},
			{Name: "restart", Toolset: "b", Effect: Destroys, Allow: "action", Role: protocol.Operator},
		} {
			Add(s, tool, func(context.Context, *Call, struct{}) (*Answer[line], error) {
				return &Answer[line]{Summary: "done"}, nil
			})
		}
	}
	for name, test := range map[string]struct {
		o    Options
		want string
	}{
		"read-only":         {Options{ReadOnly: true, Allow: []string{"deploy", "action"}, Caller: Caller{Role: protocol.Admin}}, "look server-info"},
		"nothing allowed":   {Options{Caller: Caller{Role: protocol.Admin}}, "look server-info"},
		"one allowed":       {Options{Allow: []string{"action"}, Caller: Caller{Role: protocol.Admin}}, "look restart server-info"},
		"the role is short": {Options{Allow: []string{"deploy", "action"}, Caller: Caller{Role: protocol.Operator}}, "look restart server-info"},
		"no role":           {Options{Allow: []string{"deploy", "action"}}, "look server-info"},
		"a toolset":         {Options{Toolsets: []string{"b"}, Allow: []string{"action"}, Caller: Caller{Role: protocol.Admin}}, "restart"},
	} {
		t.Run(name, func(t *testing.T) {
			test.o.Name, test.o.Version = "test", "1"
			s := New(test.o)
			add(s)
			c := connected(t, s, mcp.ProtocolVersion20251125)
			list, err := c.ListTools(t.Context(), mcp.ListToolsRequest{})
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, tool := range list.Tools {
				names = append(names, tool.Name)
				a := tool.Annotations
				if a.ReadOnlyHint == nil || a.DestructiveHint == nil || a.IdempotentHint == nil || a.OpenWorldHint == nil {
					t.Errorf("%s lacks one of the four hints", tool.Name)
				}
			}
			if got := strings.Join(names, " "); got != test.want {
				t.Errorf("there are %q, not %q", got, test.want)
			}
			for _, tool := range []string{"deploy", "restart"} {
				_, err := c.CallTool(t.Context(), mcp.CallToolRequest{Params: mcp.CallToolParams{Name: tool}})
				if listed := strings.Contains(test.want, tool); listed != (err == nil) {
					t.Errorf("calling %s: %v", tool, err)
				}
			}
		})
	}
}

// Every revision that the library knows is served, with its own way to begin.
func TestRevisions(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	for _, version := range mcp.ValidProtocolVersions {
		c := connected(t, s, version)
		if c.ProtocolVersion() != version {
			t.Errorf("%s became %s", version, c.ProtocolVersion())
		}
		if text, _, failed := call(t, c, "server-info", nil); failed || !strings.HasPrefix(text, "test 1") {
			t.Errorf("%s: %s", version, text)
		}
	}
	if newest, oldest := mcp.ValidProtocolVersions[0], mcp.ValidProtocolVersions[len(mcp.ValidProtocolVersions)-1]; newest != "2026-07-28" || oldest != "2024-11-05" {
		t.Errorf("docs/mcp.md says 2024-11-05 to 2026-07-28, and it is %s to %s", oldest, newest)
	}
}

// asked is a person who answers in a client.
type asked struct {
	answer  mcp.ElicitationResponseAction
	confirm any
	message string
}

func (a *asked) Elicit(_ context.Context, r mcp.ElicitationRequest) (*mcp.ElicitationResult, error) {
	a.message = r.Params.Message
	return &mcp.ElicitationResult{ElicitationResponse: mcp.ElicitationResponse{Action: a.answer, Content: map[string]any{"confirm": a.confirm}}}, nil
}

func TestConfirm(t *testing.T) {
	var done int
	s := New(Options{Name: "test", Version: "1"})
	Add(s, Tool{Name: "act", Toolset: "test", Effect: Destroys}, func(ctx context.Context, c *Call, in lineIn) (*Answer[line], error) {
		if err := c.Confirm(ctx, fmt.Sprintf("remove %d lines", in.Lines)); err != nil {
			return nil, err
		}
		done++
		return &Answer[line]{Summary: "done"}, nil
	})
	for _, version := range []string{mcp.ProtocolVersion20251125, mcp.ProtocolVersion20260728} {
		for _, test := range []struct {
			person *asked
			want   string
		}{
			{&asked{answer: mcp.ElicitationResponseActionAccept, confirm: true}, "done"},
			{&asked{answer: mcp.ElicitationResponseActionAccept, confirm: false}, "not confirmed"},
			{&asked{answer: mcp.ElicitationResponseActionAccept, confirm: "true"}, "not confirmed"},
			{&asked{answer: mcp.ElicitationResponseActionDecline, confirm: true}, "not confirmed"},
			{&asked{answer: mcp.ElicitationResponseActionCancel}, "not confirmed"},
			{nil, "can't ask one"},
		} {
			done = 0
			c := personal(t, s, version, test.person)
			if c.ProtocolVersion() != version {
				t.Fatalf("the client speaks %s", c.ProtocolVersion())
			}
			text, _, failed := call(t, c, "act", map[string]any{"lines": 3})
			if !strings.Contains(text, test.want) || failed == (test.want == "done") || (done == 1) != (test.want == "done") {
				t.Errorf("%s, %+v: %q, done %d times", version, test.person, text, done)
			}
			if test.person != nil && test.person.message != "remove 3 lines" {
				t.Errorf("%s: the person was asked %q", version, test.person.message)
			}
		}
	}
}

// personal is a client with a person, or without one.
func personal(t *testing.T, s *Server, version string, person *asked) *client.Client {
	t.Helper()
	if person == nil {
		return connected(t, s, version)
	}
	c := client.NewClient(transport.NewInProcessTransportWithOptions(s.mcp, transport.WithElicitationHandler(person)), client.WithElicitationHandler(person))
	greet(t, c, version)
	return c
}

// modern is a call's context of a client that speaks the revision in which it calls again, and can ask a person.
func modern(t *testing.T) context.Context {
	return server.WithRequestProtocolInfo(t.Context(), &server.RequestProtocolInfo{Modern: true,
		ClientCapabilities: &mcp.ClientCapabilities{Elicitation: &mcp.ElicitationCapability{}}})
}

// askedFor is a call that was answered with a question, and comes again with a yes.
func askedFor(t *testing.T, s *Server, text string, bound ...string) *Call {
	t.Helper()
	c := &Call{server: s, tool: &Tool{Name: "act"}, args: []byte(`{"lines":3}`)}
	var pending *needsInput
	if err := c.Confirm(modern(t), text, bound...); !errors.As(err, &pending) {
		t.Fatalf("nobody is asked: %v", err)
	}
	c.mcp.Params.RequestState = pending.result.RequestState
	c.mcp.Params.InputResponses = mcp.InputResponses{"confirm": mcp.NewElicitationInputResponse(mcp.ElicitationResult{ElicitationResponse: mcp.ElicitationResponse{
		Action: mcp.ElicitationResponseActionAccept, Content: map[string]any{"confirm": true}}})}
	return c
}

func TestConfirmationsAreForWhatWasAsked(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	for name, change := range map[string]func(c *Call) (text, digest string){
		"the same":         func(*Call) (string, string) { return "remove 3 lines", "a" },
		"another text":     func(*Call) (string, string) { return "remove 4 lines", "a" },
		"another digest":   func(*Call) (string, string) { return "remove 3 lines", "b" },
		"another tool":     func(c *Call) (string, string) { c.tool = &Tool{Name: "other"}; return "remove 3 lines", "a" },
		"other inputs":     func(c *Call) (string, string) { c.args = []byte(`{"lines":4}`); return "remove 3 lines", "a" },
		"another caller":   func(c *Call) (string, string) { c.Caller.Name = "other"; return "remove 3 lines", "a" },
		"another role":     func(c *Call) (string, string) { c.Caller.Role = protocol.Admin; return "remove 3 lines", "a" },
		"other keys":       func(c *Call) (string, string) { c.Caller.Key = "U2"; return "remove 3 lines", "a" },
		"no signature":     func(c *Call) (string, string) { c.mcp.Params.RequestState = "AAAA"; return "remove 3 lines", "a" },
		"another server's": func(c *Call) (string, string) { c.server = New(Options{Name: "test"}); return "remove 3 lines", "a" },
		"no answer":        func(c *Call) (string, string) { c.mcp.Params.InputResponses = nil; return "remove 3 lines", "a" },
	} {
		again := askedFor(t, s, "remove 3 lines", "a")
		text, digest := change(again)
		if err := again.Confirm(modern(t), text, digest); (err == nil) != (name == "the same") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A yes is good for one time, however its state is written, and not for ever.
func TestConfirmationsAreUsedUp(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	c := askedFor(t, s, "remove 3 lines")
	if err := c.Confirm(modern(t), "remove 3 lines"); err != nil {
		t.Fatal(err)
	}
	for _, state := range []string{c.mcp.Params.RequestState, c.mcp.Params.RequestState + "\n"} {
		c.mcp.Params.RequestState = state
		if err := c.Confirm(modern(t), "remove 3 lines"); err == nil || !strings.Contains(err.Error(), "confirmed once") {
			t.Errorf("a yes counts twice: %v", err)
		}
	}
	s.confirmFor = -time.Second
	if err := askedFor(t, s, "remove 3 lines").Confirm(modern(t), "remove 3 lines"); err == nil || !strings.Contains(err.Error(), "took longer") {
		t.Errorf("a yes counts after its time: %v", err)
	}
}

// silent is a person who is asked and says nothing, until the client gives up.
type silent struct{ asked chan struct{} }

func (s silent) Elicit(ctx context.Context, _ mcp.ElicitationRequest) (*mcp.ElicitationResult, error) {
	s.asked <- struct{}{}
	<-ctx.Done()
	return nil, ctx.Err()
}

// Before revision 2026-07-28 the server waits for the person, and not for ever. A call that is cancelled meanwhile ends.
func TestNobodyConfirms(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	done := false
	Add(s, Tool{Name: "act", Toolset: "test", Effect: Destroys, Timeout: time.Nanosecond}, func(ctx context.Context, c *Call, _ struct{}) (*Answer[line], error) {
		if err := c.Confirm(ctx, "remove all"); err != nil {
			return nil, err
		}
		done = true
		return &Answer[line]{Summary: "done"}, nil
	})
	person := silent{make(chan struct{}, 1)}
	c := client.NewClient(transport.NewInProcessTransportWithOptions(s.mcp, transport.WithElicitationHandler(person)), client.WithElicitationHandler(person))
	greet(t, c, mcp.ProtocolVersion20251125)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		<-person.asked
		cancel()
	}()
	if r, err := c.CallTool(ctx, mcp.CallToolRequest{Params: mcp.CallToolParams{Name: "act"}}); err == nil && !r.IsError {
		t.Errorf("a call that was cancelled says %v", r.Content)
	}
	s.confirmFor = time.Millisecond
	if text, _, failed := call(t, c, "act", nil); !failed || !strings.Contains(text, "nobody confirmed it within 1ms") {
		t.Errorf("%q", text)
	}
	if done {
		t.Error("it was done")
	}
}
