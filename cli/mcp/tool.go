package mcp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/jsonschema-go/jsonschema"
	"github.com/mark3labs/mcp-go/mcp"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// Effect is what a tool does to the world.
type Effect int

const (
	Reads    Effect = iota // changes nothing
	Destroys               // may undo or end what was there
)

// Tool is what is told of a tool. All four of MCP's hints are worked out from it.
type Tool struct {
	Name        string
	Title       string
	Description string // for the assistant: what it gives, when to use it, what the inputs may be
	Toolset     string

	Effect    Effect
	OpenWorld bool          // it reaches what is neither the project nor its fleet
	Role      protocol.Role // the least that the caller needs; "" where nobody else is asked
	Allow     string        // the word of --allow that it needs; "" for none

	Timeout time.Duration // how long a call may take; 0 means a minute
}

// Handler answers a call. What it returns as an error is told to the assistant, as a refusal.
type Handler[In, Row any] func(ctx context.Context, c *Call, in In) (*Answer[Row], error)

// Call is one call of a tool.
type Call struct {
	Caller Caller
	server *Server
	tool   *Tool
	args   []byte // as they were given, in canonical JSON
	mcp    mcp.CallToolRequest
}

const defaultTimeout = time.Minute

// Add gives the server a tool, unless its options leave the tool out. In is a struct; its fields are the inputs, with json
// tags, and these beside them: jsonschema (what it is), enum (its values, with commas), max (characters of a text, 4096 if
// nothing is said; items of a list, 256). Fields without omitempty have to be given. An input "cursor" is added, which
// goes on with an answer that was cut. Row is what structured answers have many of.
func Add[In, Row any](s *Server, t Tool, handle Handler[In, Row]) {
	if !slices.Contains(s.toolsets, t.Toolset) {
		s.toolsets = append(s.toolsets, t.Toolset)
	}
	if t.Effect != Reads && s.ReadOnly || t.Allow != "" && !slices.Contains(s.Allow, t.Allow) || !s.has(t.Toolset) {
		return
	}
	s.tools[t.Name] = &t
	s.mcp.AddTool(definition[In, Row](&t), func(ctx context.Context, r mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		c := &Call{Caller: s.callerOf(ctx), server: s, tool: &t, mcp: r}
		began := time.Now()
		result, err := answer(ctx, c, handle)
		if err == nil && result.NeedsInput() && !callsAgain(ctx) {
			if err = c.askPerson(ctx, result); err == nil {
				result, err = answer(ctx, c, handle)
			}
		}
		c.record(result, err, time.Since(began))
		if err != nil {
			result = mcp.NewToolResultError(explain(ctx, err))
		}
		return result, nil
	})
}

// maxError is how long an error may be, in bytes.
const maxError = 4 << 10

// said is an error in words of others.
type said struct{ error }

func (s said) Unwrap() error { return s.error }

// Said marks an error as one in words of others: the assistant reads it in a fence. A refusal of a node's or of the controller's
// need not be marked.
func Said(err error) error { return said{err} }

// explain is an error as the assistant reads it, cleaned: on one line, or in a fence where others had a say in it.
func explain(ctx context.Context, err error) string {
	var r *protocol.Refusal
	var others said
	how := ""
	switch {
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		return "cancelled"
	case errors.As(err, &r):
		how = "refused (" + Name(string(r.Code)) + "):\n"
	case errors.As(err, &others):
		how = "it did not work:\n"
	default:
		return cut(clean(strings.ReplaceAll(err.Error(), "\n", "; ")), maxError)
	}
	word := fenceWord()
	return how + fenceBegin(word) + strings.TrimSuffix(cut(Clean(err.Error()), maxError), "\n") + "\n" + fenceEnd(word)
}

// guarded works on a call, within its time. A panic of a handler's is an error of this call alone.
func guarded[T any](ctx context.Context, c *Call, work func(ctx context.Context) (T, error)) (result T, err error) {
	defer func() {
		if p := recover(); p != nil {
			c.server.Log.Error("a tool panicked", "tool", c.tool.Name, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = errors.New("this is a fault of the server's own; its stderr has more")
		}
	}()
	timeout := c.tool.Timeout
	if timeout == 0 {
		timeout = defaultTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("it took longer than %v", timeout))
	defer cancel()
	if result, err = work(ctx); err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = context.Cause(ctx)
	}
	return result, err
}

// answer carries a call out.
func answer[In, Row any](ctx context.Context, c *Call, handle Handler[In, Row]) (*mcp.CallToolResult, error) {
	return guarded(c.withProgress(ctx), c, func(ctx context.Context) (*mcp.CallToolResult, error) {
		in, cursor, err := arguments[In](c)
		if err != nil {
			return nil, err
		}
		if cursor != "" {
			return c.server.pages.next(c, cursor)
		}
		a, err := handle(ctx, c, in)
		var pending *needsInput
		switch {
		case errors.As(err, &pending):
			return pending.result, nil
		case err != nil:
			return nil, err
		}
		return c.server.pages.first(c, a.render())
	})
}

// arguments reads the inputs, which fit the schema already.
func arguments[In any](c *Call) (in In, cursor string, err error) {
	given, ok := c.mcp.Params.Arguments.(map[string]any)
	if !ok {
		given = map[string]any{}
	}
	if v, ok := given["cursor"]; ok {
		cursor, _ = v.(string)
		delete(given, "cursor")
	}
	if c.args, err = json.Marshal(given); err != nil {
		return in, "", err
	}
	d := json.NewDecoder(bytes.NewReader(c.args))
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		return in, "", fmt.Errorf("the inputs: %w", err)
	}
	return in, cursor, nil
}

// record writes the line about a call.
func (c *Call) record(result *mcp.CallToolResult, err error, took time.Duration) {
	outcome := "ok"
	switch {
	case err != nil:
		outcome = "refused: " + ui.Clean(err.Error())
	case result.NeedsInput():
		outcome = "asked for confirmation"
	case result.IsError:
		outcome = "failed"
	}
	c.server.Log.Info("call", "tool", c.tool.Name, "caller", c.Caller.Name, "role", c.Caller.Role, "token", c.Caller.Token,
		"inputs", cut(string(c.args), maxRecorded), "outcome", cut(outcome, maxRecorded), "ms", took.Milliseconds())
}

// maxRecorded is how many bytes of a call's inputs, and of its outcome, the line about it has.
const maxRecorded = 1 << 10

// definition is a tool as it is listed.
func definition[In, Row any](t *Tool) mcp.Tool {
	reads := t.Effect == Reads
	return mcp.NewTool(t.Name,
		mcp.WithDescription(t.Description),
		mcp.WithToolTitle(t.Title),
		mcp.WithTitleAnnotation(t.Title),
		mcp.WithReadOnlyHintAnnotation(reads),
		mcp.WithDestructiveHintAnnotation(t.Effect == Destroys),
		mcp.WithIdempotentHintAnnotation(reads),
		mcp.WithOpenWorldHintAnnotation(t.OpenWorld),
		func(m *mcp.Tool) { m.InputSchema.Type = "" },
		mcp.WithRawInputSchema(inputSchema[In]()),
		mcp.WithRawOutputSchema(outputSchema[Row]()),
	)
}

// inputSchema makes the schema of a struct of inputs. A mistake in its tags is the program's own, and panics at the start.
func inputSchema[In any]() json.RawMessage {
	s, err := jsonschema.For[In](nil)
	if err != nil {
		panic(err)
	}
	bound(reflect.TypeFor[In](), s)
	if s.Properties == nil {
		s.Properties = map[string]*jsonschema.Schema{}
	}
	s.Properties["cursor"] = &jsonschema.Schema{Type: "string", MaxLength: new(maxCursor),
		Description: "goes on with an answer of this tool that was cut: the next of that answer, with the other inputs as they were"}
	return encode(s)
}

// bound adds to the schema of a struct what its tags say.
func bound(t reflect.Type, s *jsonschema.Schema) {
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		p := s.Properties[name]
		if p == nil {
			continue
		}
		limit, _ := strconv.Atoi(f.Tag.Get("max"))
		if p.Type == "" && len(p.Types) > 0 {
			p.Type, p.Types = p.Types[len(p.Types)-1], nil // a slice that may be null: it may not
		}
		switch p.Type {
		case "string":
			p.MaxLength = new(max(limit, 0))
			if limit == 0 {
				p.MaxLength = new(4096)
			}
		case "array":
			p.MaxItems = new(limit)
			if limit == 0 {
				p.MaxItems = new(256)
			}
			p.Items.MaxLength = new(4096)
		}
		for value := range strings.SplitSeq(f.Tag.Get("enum"), ",") {
			if value != "" {
				p.Enum = append(p.Enum, value)
			}
		}
	}
}

func encode(s *jsonschema.Schema) json.RawMessage {
	data, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return data
}
