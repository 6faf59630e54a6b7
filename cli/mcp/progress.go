package mcp

import (
	"context"
	"sync"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
)

// progressEvery is how often a client is told of progress at most.
const progressEvery = 250 * time.Millisecond

// progress is that of a call whose client wants to be told.
type progress struct {
	server *Server
	token  mcp.ProgressToken

	mu   sync.Mutex
	last time.Time
}

type progressKey struct{}

// withProgress has what Progress is told of go to the call's client, if it wants that.
func (c *Call) withProgress(ctx context.Context) context.Context {
	meta := c.mcp.Params.Meta
	if meta == nil || meta.ProgressToken == nil {
		return ctx
	}
	return context.WithValue(ctx, progressKey{}, &progress{server: c.server, token: meta.ProgressToken})
}

// Progress tells the client how far a call is, if it wants to know: so many of all. It costs nothing to be called often.
func Progress(ctx context.Context, done, all int) {
	p, ok := ctx.Value(progressKey{}).(*progress)
	if !ok {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := time.Now(); now.Sub(p.last) >= progressEvery {
		p.last = now
		// A client that does not read misses it.
		_ = p.server.mcp.SendNotificationToClient(ctx, string(mcp.MethodNotificationProgress), map[string]any{"progressToken": p.token, "progress": done, "total": all})
	}
}
