package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/agent/query"
	"github.com/nix-infra/nix-infra/agent/query/journal"
	"github.com/nix-infra/nix-infra/protocol"
)

// answers is the server of what this node can be asked. Who may ask is protocol's table of roles.
func (a *agent) answers() *query.Server {
	return query.New(query.Options{
		Node: a.machine.Name, Log: a.o.Log.With("part", "query"), Verifier: a.verifier, Seen: a.seen,
		Audit: a.audit.Record, Publish: a.link.Publish,
		Handlers: map[protocol.Action]query.Handler{
			protocol.Ping:            a.ping,
			protocol.Facts:           a.facts,
			protocol.Release:         a.release,
			protocol.ListGenerations: a.listGenerations,
			protocol.CollectGarbage:  a.collectGarbage,
			protocol.OwnFiles:        a.ownFiles,
			protocol.OpenTunnel:      a.tunnels.Open,
			protocol.RotateSecret:    answered(a.engine.Rotate),
			protocol.ListSecrets:     a.listSecrets,
			protocol.Rekey:           a.rekey,
			protocol.ListUnits:       answered(a.listUnits),
			protocol.ShowUnit:        answered(a.showUnit),
			protocol.ReadJournal:     answered(journal.Reader{}.Read),
			protocol.ReadStats:       answered(a.readStats),
			protocol.ReadFiles:       answered(a.readFiles),
		},
		Streams: map[protocol.Action]query.Streamer{protocol.FollowJournal: a.followJournal},
		Runs:    a.runs(),
		Limits:  map[protocol.Action]time.Duration{protocol.CollectGarbage: garbageTime, protocol.RotateSecret: rotateTime},
	})
}

func (a *agent) ping(context.Context, *protocol.Verified) (any, error) {
	return protocol.Pong{Agent: protocol.Build(), Time: time.Now().UTC()}, nil
}

func (a *agent) facts(ctx context.Context, _ *protocol.Verified) (any, error) {
	return a.heart.Beat(ctx), nil
}

func (a *agent) release(_ context.Context, r *protocol.Verified) (any, error) {
	q, err := protocol.Decode[protocol.NameRequest](r.Payload)
	if err != nil {
		return nil, protocol.Refuse(protocol.Malformed, "%v", err)
	}
	if err := a.engine.Release(q.Name); err != nil {
		var refusal *protocol.Refusal
		if errors.As(err, &refusal) {
			return nil, refusal
		}
		return nil, protocol.Refuse(protocol.Failed, "%v", err)
	}
	a.heart.Changed()
	return nil, nil
}

// maxOwnFile bounds each of the node's own files, in bytes, so that they fit into an answer.
const maxOwnFile = 128 << 10

// ownFiles are those files of the node's source tree that no deployment brings. The request names none of them. Where the facts
// can't be made, they are left out: not every configuration needs them.
func (a *agent) ownFiles(ctx context.Context, _ *protocol.Verified) (any, error) {
	files := map[string][]byte{}
	for _, name := range protocol.NodeFiles {
		data, err := readRegular(filepath.Join(a.etc, name), maxOwnFile)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("the node's own file can't be read: %w", err)
		}
		files[name] = data
	}
	if a.factsFile != nil {
		if data, err := a.factsFile(ctx); err == nil {
			files[protocol.FactsFile] = data
		} else {
			a.o.Log.Error("the facts for a configuration can't be made", "error", err)
		}
	}
	return protocol.FileList{Files: files}, nil
}

// readRegular reads a file that is one itself: no link to elsewhere, and nothing that a read could wait for.
func readRegular(file string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s is a link", file)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%s is no regular file of at most %d bytes", file, limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}
