package controller

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// What nodes say and ask. The sender is who the broker let publish on the subject, never what a body
// says, and an answer goes only below the sender's own inbox: so a node can't have anything of another's.

const (
	maxBeat      = 64 << 10
	maxQuery     = 4 << 10
	maxReport    = 256 << 10
	listingBytes = 64 << 20
)

type nodeHandler func(ctx context.Context, node string, data []byte) (any, error)

// forNode finds the sender, refuses who is not enrolled, and answers.
func (t *term) forNode(serve nodeHandler) func(context.Context, *nats.Msg) {
	return func(ctx context.Context, m *nats.Msg) {
		node, _, ok := protocol.UpSender(m.Subject)
		if !ok {
			t.ignore(m, "no node's subject")
			return
		}
		if !protocol.OwnInbox(node, m.Reply) {
			t.ignore(m, "the answer would not go to the sender")
			return
		}
		if v := protocol.SubjectVersion(m.Subject); v != ownVersion() {
			t.answer(m.Reply, nil, otherVersion(v))
			t.ignore(m, "another version of the protocol")
			return
		}
		if !t.fleet.enrolled(node) {
			t.answer(m.Reply, nil, protocol.Refuse(protocol.Unknown, "node %s is not enrolled with this controller", node))
			return
		}
		body, err := serve(ctx, node, m.Data)
		t.answer(m.Reply, body, err)
	}
}

func ownVersion() string { return fmt.Sprintf("v%d", protocol.Version) }

func otherVersion(v string) error {
	return protocol.Refuse(protocol.OtherVersion, "this controller speaks %s of the protocol, not %s; upgrade the older side", ownVersion(), v)
}

func decodeSmall[T any](data []byte, limit int) (T, error) {
	if len(data) > limit {
		var none T
		return none, protocol.Refuse(protocol.Malformed, "%d bytes, the limit is %d", len(data), limit)
	}
	v, err := protocol.Decode[T](data)
	if err != nil {
		return v, protocol.Refuse(protocol.Malformed, "%v", err)
	}
	return v, nil
}

// beat takes note of a heartbeat, and tells the node to look where it is behind. It runs in the
// subscription's own goroutine: there are a thousand a second.
func (t *term) beat(m *nats.Msg) {
	node, _, ok := protocol.UpSender(m.Subject)
	if !ok || protocol.SubjectVersion(m.Subject) != ownVersion() {
		t.ignore(m, "not a beat of this version of the protocol")
		return
	}
	if !t.fleet.enrolled(node) {
		t.ignore(m, "the node is not enrolled")
		return
	}
	b, err := decodeSmall[protocol.Beat](m.Data, maxBeat)
	if err == nil && b.Version != protocol.Version {
		err = otherVersion(fmt.Sprintf("v%d", b.Version))
	}
	if err != nil {
		t.ignore(m, err)
		return
	}
	t.alive.Beat(node, b)
	wanted, has := t.fleet.wanted(node)
	stale := b.Account != 0 && t.stale(b) // 0 is an agent that does not say
	if stale || (has && b.Serial < wanted.Serial) {
		t.look(node, wanted, stale)
	}
}

// stale tells whether a beat shows an older account JWT than the newest, or none.
func (t *term) stale(b protocol.Beat) bool { return b.Account < t.c.verifier.Issued() }

// look tells a node what it should have. The account JWT is sent only to those that lack it.
func (t *term) look(node string, d protocol.Desired, account bool) {
	l := protocol.Look{Version: protocol.Version, Serial: d.Serial, Digest: d.Digest}
	if account {
		l.Account = t.c.verifier.Account()
	}
	if err := t.c.broker.Conn.Publish(protocol.LookSubject(node), protocol.Encode(l)); err != nil {
		t.log.Warn("can't nudge a node; its next beat will", "node", node, "error", err)
	}
}

func (t *term) ping(_ context.Context, _ string, data []byte) (any, error) {
	if len(data) > maxQuery {
		return nil, protocol.Refuse(protocol.Malformed, "%d bytes, the limit is %d", len(data), maxQuery)
	}
	return nil, nil
}

func (t *term) manifest(ctx context.Context, node string, data []byte) (any, error) {
	q := protocol.ManifestQuery{}
	if len(data) > 0 {
		var err error
		if q, err = decodeSmall[protocol.ManifestQuery](data, maxQuery); err != nil {
			return nil, err
		}
	}
	var reply protocol.ManifestReply
	if alive, _ := t.alive.State(node); t.stale(alive.Beat) {
		reply.Account = t.c.verifier.Account()
	}
	if q.Digest == "" {
		d, ok := t.fleet.wanted(node)
		if !ok {
			return reply, nil
		}
		q.Digest = d.Digest
	}
	if !t.fleet.mayHave(node, q.Digest) {
		return nil, protocol.Refuse(protocol.Unknown, "there is no such manifest for %s", node)
	}
	doc, err := t.document(ctx, q.Digest, t.blobs.Get)
	if err != nil {
		return nil, err
	}
	reply.Digest, reply.Manifest = q.Digest, doc
	return reply, nil
}

func (t *term) blob(ctx context.Context, node string, data []byte) (any, error) {
	q, err := decodeSmall[protocol.BlobQuery](data, maxQuery)
	if err != nil {
		return nil, err
	}
	if !t.fleet.mayHave(node, q.Manifest) {
		return nil, noBlob(node)
	}
	return t.piece(ctx, node, q)
}

// document is a signed manifest as it was signed.
func (t *term) document(ctx context.Context, digest string, read func(context.Context, string) ([]byte, error)) ([]byte, error) {
	compressed, err := read(ctx, digest)
	if err != nil {
		return nil, err
	}
	doc, err := t.decoder.DecodeAll(compressed, nil)
	if err != nil {
		return nil, fmt.Errorf("manifest %s is damaged: %w", digest, err)
	}
	return doc, nil
}

// listing is what a manifest lists, sorted. The manifest was verified when it was deployed.
func (t *term) listing(ctx context.Context, digest string) ([]string, error) {
	if l, ok := t.listings.Get(digest); ok {
		return l, nil
	}
	doc, err := t.document(ctx, digest, t.blobs.Get)
	if err != nil {
		return nil, err
	}
	blobs, err := listed(doc)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", digest, err)
	}
	t.listings.Add(digest, blobs, int64(len(blobs)*80))
	return blobs, nil
}

func listed(doc []byte) ([]string, error) {
	signed, err := protocol.Decode[protocol.Signed](doc)
	if err != nil {
		return nil, err
	}
	m, err := protocol.Decode[protocol.Manifest](signed.Payload)
	if err != nil {
		return nil, err
	}
	return m.Blobs(), nil
}

// report keeps how a manifest ended on a node. It is acknowledged once it is in etcd, or when there is
// nothing that it could be kept with: then sending it again would not help either.
func (t *term) report(ctx context.Context, node string, data []byte) (any, error) {
	r, err := decodeSmall[protocol.Report](data, maxReport)
	if err != nil {
		return nil, err
	}
	if r.Version != protocol.Version {
		return nil, otherVersion(fmt.Sprintf("v%d", r.Version))
	}
	p, has, kept := t.fleet.part(r.Deployment, node)
	if !kept {
		t.log.Info("a report of a deployment that is not on record", "node", node, "deployment", r.Deployment, "phase", r.Phase)
		return nil, nil
	}
	if !has || p.Serial != r.Serial || p.held() {
		return nil, protocol.Refuse(protocol.Unknown, "%s has no part with serial %d in deployment %s", node, r.Serial, r.Deployment)
	}
	e := p.Entry
	if p.phase != "" { // a staged system reports twice: when it is the boot default, and when it was proven
		var ok bool
		if e, ok, err = t.c.store.Entry(ctx, r.Deployment, node); err != nil {
			return nil, err
		} else if !ok {
			return nil, errors.New("the deployment was just removed")
		}
		if e.Report != nil && e.Report.Ended.After(r.Ended) {
			return nil, nil
		}
	}
	if r.Phase == protocol.Confirmed && r.Mode != protocol.DryActivate {
		r.Log = ""
	}
	e.Report = &r
	if err := t.lead.PutEntry(ctx, r.Deployment, node, e); err != nil {
		return nil, err
	}
	t.fleet.setPart(r.Deployment, node, partOf(e, len(protocol.Encode(e))))
	t.rollouts.touch(r.Deployment)
	t.log.Info("a node is done", "node", node, "deployment", r.Deployment, "phase", r.Phase, "reason", r.Reason)
	return nil, nil
}

// pace makes pieces smaller while many are asked for: what slow nodes have not taken yet waits in the
// broker's memory.
type pace struct {
	mu     sync.Mutex
	second int64
	sent   int64
}

const (
	fullPace   = 64 << 20 // bytes a second in pieces of full size
	smallPiece = 64 << 10
)

func (p *pace) next(now time.Time) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := now.Unix(); s != p.second {
		p.second, p.sent = s, 0
	}
	piece := int64(protocol.ChunkSize)
	if p.sent > fullPace {
		piece = smallPiece
	}
	p.sent += piece
	return piece
}
