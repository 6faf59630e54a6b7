package dev

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/mcp/session"
)

// Bounds of get_output. An answer carries so much in one piece, also where each byte of it is escaped in JSON.
const (
	defaultChunks = 50
	maxChunks     = 200
	maxAtOnce     = 12 << 10 // bytes
)

// sessionRow is a session, or a piece of what it said.
type sessionRow struct {
	SessionID string `json:"session_id"`
	Operation string `json:"operation"`
	TestName  string `json:"test_name,omitempty"`
	Status    string `json:"status" jsonschema:"running, finished, cancelled or failed (it could not be started, or a signal ended it)"`
	Reason    string `json:"reason,omitempty"`
	ExitCode  *int   `json:"exit_code,omitempty"`
	Started   string `json:"started"`
	Left      int    `json:"processes_left,omitempty" jsonschema:"processes that it left running; cancel ends them"`

	IsComplete     bool   `json:"is_complete" jsonschema:"whether it has ended, and all that it said is there"`
	TotalChunks    int    `json:"total_chunks"`
	ChunkIndex     *int   `json:"chunk_index,omitempty" jsonschema:"of the first chunk in output"`
	ChunksReturned int    `json:"chunks_returned,omitempty"`
	HasMoreChunks  bool   `json:"has_more_chunks" jsonschema:"there is more, or will be"`
	NextChunkIndex *int   `json:"next_chunk_index,omitempty" jsonschema:"where to go on with get_output"`
	Output         string `json:"output,omitempty"`
	Message        string `json:"message,omitempty"`
}

// sessionInput is what both tools with sessions take for them.
type sessionInput struct {
	SessionID  string `json:"session_id,omitempty" max:"64" jsonschema:"for get_output and cancel"`
	ChunkIndex int    `json:"chunk_index,omitempty" jsonschema:"for get_output: the first chunk that is wanted, counted from 0"`
	MaxChunks  int    `json:"max_chunks,omitempty" jsonschema:"for get_output: 50 by default, 200 at most"`
}

func rowOf(s *session.Session) *sessionRow {
	status := s.Status()
	row := &sessionRow{
		SessionID: s.ID, Operation: s.Order.Operation, TestName: s.Order.Subject, Status: string(status.State), Reason: status.Reason, ExitCode: status.ExitCode,
		Started: s.Started.UTC().Format("2006-01-02T15:04:05Z"), Left: status.Left,
	}
	select {
	case <-s.Ended():
		row.IsComplete = true
	default:
	}
	_, row.TotalChunks, _ = s.Output(0, 0, 0)
	return row
}

func (r *sessionRow) text() string {
	text := r.SessionID + ": " + strings.TrimSpace(r.Operation+" "+r.TestName) + ", " + r.Status
	if r.ExitCode != nil {
		text += fmt.Sprintf(" with exit code %d", *r.ExitCode)
	}
	if r.Reason != "" {
		text += ": " + r.Reason
	}
	if r.Left > 0 {
		text += fmt.Sprintf("; %d processes of it still run", r.Left)
	}
	return text
}

// sessionOperation carries out what is the same for all tools with sessions. ok is false for an operation of another kind.
func (d *Server) sessionOperation(ctx context.Context, tool, operation string, in sessionInput) (a *mcp.Answer[sessionRow], ok bool, err error) {
	switch operation {
	case "list_sessions":
		return d.listSessions(tool), true, nil
	case "get_output", "cancel":
	default:
		if in != (sessionInput{}) {
			return nil, true, fmt.Errorf("%s begins a session, and takes no session_id, chunk_index or max_chunks", operation)
		}
		return nil, false, nil
	}
	if in.SessionID == "" {
		return nil, true, fmt.Errorf("%s needs a session_id; list_sessions tells which there are", operation)
	}
	s := d.sessions.Get(in.SessionID)
	if s == nil || s.Order.Tool != tool {
		return nil, true, fmt.Errorf("there is no session %.64q of %s; list_sessions tells which there are", in.SessionID, tool)
	}
	if operation == "cancel" {
		if err := s.Cancel(ctx); err != nil {
			return nil, true, err
		}
		row := rowOf(s)
		return &mcp.Answer[sessionRow]{Summary: "All processes of the session are gone. " + row.text(), Parts: []mcp.Part[sessionRow]{{Row: row}}}, true, nil
	}
	a, err = output(s, in)
	return a, true, err
}

func (d *Server) listSessions(tool string) *mcp.Answer[sessionRow] {
	a := &mcp.Answer[sessionRow]{}
	for _, s := range d.sessions.List() {
		if s.Order.Tool == tool {
			row := rowOf(s)
			a.Parts = append(a.Parts, mcp.Part[sessionRow]{Text: row.text(), Row: row})
		}
	}
	a.Summary = fmt.Sprintf("%d sessions. Those that ended are forgotten after an hour.", len(a.Parts))
	return a
}

func output(s *session.Session, in sessionInput) (*mcp.Answer[sessionRow], error) {
	if in.ChunkIndex < 0 || in.MaxChunks < 0 {
		return nil, errors.New("chunk_index and max_chunks are not negative")
	}
	count := min(in.MaxChunks, maxChunks)
	if count == 0 {
		count = defaultChunks
	}
	row := rowOf(s) // before the chunks: what is complete is all there
	chunks, total, err := s.Output(in.ChunkIndex, count, maxAtOnce)
	if err != nil {
		return nil, err
	}
	next := min(in.ChunkIndex, total) + len(chunks)
	row.TotalChunks, row.ChunkIndex, row.ChunksReturned = total, &in.ChunkIndex, len(chunks)
	row.HasMoreChunks = next < total || !row.IsComplete
	if row.HasMoreChunks {
		row.NextChunkIndex = &next
	}
	switch {
	case next < total:
		row.Message = fmt.Sprintf("go on with chunk_index %d", next)
	case !row.IsComplete:
		row.Message = fmt.Sprintf("it is still running; ask again in a while with chunk_index %d", next)
	default:
		row.Message = "this is all"
	}
	text := strings.ToValidUTF8(strings.Join(chunks, ""), "\uFFFD")
	row.Output = mcp.Clean(text)
	return &mcp.Answer[sessionRow]{
		Summary: row.text() + ". " + row.Message + ".",
		Parts:   []mcp.Part[sessionRow]{{Text: text, Untrusted: true, Row: row}},
	}, nil
}

// started answers that a session has begun.
func (d *Server) started(o session.Order) (*mcp.Answer[sessionRow], error) {
	s, err := d.sessions.Start(o)
	if err != nil {
		return nil, err
	}
	row := rowOf(s)
	row.Message = fmt.Sprintf("get_output with session_id %s tells how it goes", s.ID)
	return &mcp.Answer[sessionRow]{Summary: "Started " + s.ID + ". " + row.Message + ".", Parts: []mcp.Part[sessionRow]{{Row: row}}}, nil
}
