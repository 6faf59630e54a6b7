package controller

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
)

const maxSeen = 200_000

// seen remembers requests until they expire. Those that must not run twice are remembered in etcd,
// too, so that neither a restart nor another leader runs them again.
type seen struct {
	lead *store.Term

	mu    sync.Mutex
	ids   map[string]time.Time
	swept time.Time
}

func loadSeen(ctx context.Context, s *store.Store, lead *store.Term) (*seen, error) {
	ids, err := s.Remembered(ctx)
	return &seen{lead: lead, ids: ids, swept: time.Now()}, err
}

// repeatable are the actions for which remembering in memory is enough: asking twice tells no more
// than asking once, and a blob is what its digest says, whoever sends it how often.
func repeatable(a protocol.Action) bool {
	return protocol.LeastRole(a) == protocol.Viewer || a == protocol.MissingBlobs || a == protocol.PutBlobs || a == protocol.ShowAudit || a == protocol.ListJoinings
}

func (s *seen) add(id string, until time.Time) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if now.Sub(s.swept) > protocol.ClockSkew || len(s.ids) >= maxSeen {
		for id, until := range s.ids {
			if now.After(until) {
				delete(s.ids, id)
			}
		}
		s.swept = now
	}
	if _, ok := s.ids[id]; ok {
		return true, nil
	}
	if len(s.ids) >= maxSeen {
		return false, errors.New("too many requests at once; try again in a minute")
	}
	s.ids[id] = until
	return false, nil
}

// seenFor is the memory for one request, as protocol.Verifier wants it.
type seenFor struct {
	*seen
	ctx     context.Context
	durable bool
}

// Add implements protocol.Seen.
func (s seenFor) Add(id string, until time.Time) (bool, error) {
	known, err := s.add(id, until)
	if err != nil || known || !s.durable {
		return known, err
	}
	return false, s.lead.Remember(s.ctx, id, until)
}
