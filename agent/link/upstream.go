package link

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// maxBlob bounds a blob's zstd form: what does not compress grows a little.
const maxBlob = protocol.MaxFileSize + protocol.MaxFileSize/64 + 64<<10

// Beat publishes a heartbeat.
func (l *Link) Beat(b protocol.Beat) error {
	return l.Publish(protocol.UpSubject(l.node, protocol.UpBeat), protocol.Encode(b))
}

// Publish sends without waiting for anybody.
func (l *Link) Publish(subject string, data []byte) error {
	nc, err := l.conn()
	if err != nil {
		return err
	}
	return nc.Publish(subject, data)
}

// Event publishes progress of a deployment. It never blocks: what can't be sent is dropped.
func (l *Link) Event(deployment string, e protocol.Event) {
	if _, err := l.conn(); err != nil {
		return
	}
	select {
	case l.events <- event{protocol.EventSubject(l.node, deployment), protocol.Encode(e)}:
	default:
	}
}

// Manifest asks for the signed manifest of a digest, or with "" for the one that the node should have.
// It comes unverified. A controller that says no does so by a *protocol.Refusal.
func (l *Link) Manifest(ctx context.Context, digest string) (protocol.ManifestReply, error) {
	body, err := l.ask(ctx, protocol.UpManifest, protocol.ManifestQuery{Digest: digest})
	if err != nil {
		return protocol.ManifestReply{}, fmt.Errorf("manifest: %w", err)
	}
	reply, err := protocol.Decode[protocol.ManifestReply](body)
	if err != nil {
		return protocol.ManifestReply{}, fmt.Errorf("manifest: the controller's answer: %w", err)
	}
	l.account(reply.Account)
	return reply, nil
}

// Blob fetches the whole zstd form of a blob that a manifest lists, piece by piece. Its content comes
// unverified, its size is bounded.
func (l *Link) Blob(ctx context.Context, manifest, blob string) ([]byte, error) {
	data, err := collect(func(offset int64) (protocol.BlobReply, error) {
		body, err := l.ask(ctx, protocol.UpBlob, protocol.BlobQuery{Manifest: manifest, Blob: blob, Offset: offset})
		if err != nil {
			return protocol.BlobReply{}, err
		}
		return protocol.Decode[protocol.BlobReply](body)
	})
	if err != nil {
		return nil, fmt.Errorf("blob %.12s: %w", blob, err)
	}
	return data, nil
}

// collect puts a blob together. The controller is not believed: neither about the size, for which
// memory is taken only as data comes, nor to come to an end.
func collect(piece func(offset int64) (protocol.BlobReply, error)) ([]byte, error) {
	var data []byte
	var size int64
	for pieces := int64(0); ; pieces++ {
		p, err := piece(int64(len(data)))
		if err != nil {
			return nil, err
		}
		switch {
		case pieces == 0 && (p.Size <= 0 || p.Size > maxBlob):
			return nil, fmt.Errorf("the controller says that it has %d bytes; 1 to %d are possible", p.Size, maxBlob)
		case pieces > 0 && p.Size != size:
			return nil, fmt.Errorf("its size changed from %d to %d bytes on the way", size, p.Size)
		case len(p.Data) == 0 || len(p.Data) > protocol.ChunkSize || int64(len(data)+len(p.Data)) > p.Size:
			return nil, fmt.Errorf("a piece of %d bytes at %d of %d does not fit", len(p.Data), len(data), p.Size)
		case pieces > 16+4*p.Size/protocol.ChunkSize:
			return nil, fmt.Errorf("it comes in crumbs: %d of %d bytes after %d pieces", len(data), p.Size, pieces)
		}
		size = p.Size
		data = append(data, p.Data...)
		if int64(len(data)) == size {
			return data, nil
		}
	}
}

// Report tells the controller how a manifest ended and returns once it has acknowledged.
func (l *Link) Report(ctx context.Context, r protocol.Report) error {
	if _, err := l.ask(ctx, protocol.UpReport, r); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}

// Probe proves that the controller can be reached from here, now: over a new connection, since the
// one that we have may have outlived the network that it was made on. If it has, it is given up.
func (l *Link) Probe(ctx context.Context) error {
	urls := slices.Clone(l.o.Machine.Answer.Controllers)
	last := l.transport() + "://"
	slices.SortStableFunc(urls, func(a, b string) int {
		return boolToInt(strings.HasPrefix(b, last)) - boolToInt(strings.HasPrefix(a, last))
	})
	nc, err := l.dial(ctx, urls)
	if err != nil {
		return fmt.Errorf("no new connection to a controller: %w", err)
	}
	defer nc.Close()
	if _, err := l.askOn(ctx, nc, protocol.UpPing, struct{}{}); err != nil {
		return fmt.Errorf("no answer over a new connection: %w", err)
	}
	l.renewStale()
	return nil
}

func boolToInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// renewStale closes the connection if nothing comes back over it; Run makes another one. Pings would
// find out, too, a minute later.
func (l *Link) renewStale() {
	nc, err := l.conn()
	if err != nil {
		return
	}
	if err := nc.FlushTimeout(3 * time.Second); errors.Is(err, nats.ErrTimeout) {
		l.o.Log.Warn("the controller answers new connections only, so the old one is given up")
		nc.Close()
	}
}

// Audit hands encoded audit records to the audit stream, in one message, and returns once it has them. The stream drops a
// message with the same records if it comes again soon.
func (l *Link) Audit(ctx context.Context, records [][]byte) error {
	nc, err := l.conn()
	if err != nil {
		return err
	}
	m := nats.NewMsg(protocol.UpSubject(l.node, protocol.UpAudit))
	m.Data = protocol.JoinRecords(records)
	m.Header.Set(nats.MsgIdHdr, l.node+"."+protocol.Digest(m.Data))
	ctx, cancel := context.WithTimeout(ctx, l.o.Patience)
	defer cancel()
	ack, err := nc.RequestMsgWithContext(ctx, m)
	if err != nil {
		return fmt.Errorf("the audit stream does not acknowledge: %w", err)
	}
	return checkAck(ack.Data)
}

// checkAck reads what JetStream says to a published message.
func checkAck(data []byte) error {
	var ack struct {
		Stream string `json:"stream"`
		Error  *struct {
			Description string `json:"description"`
		} `json:"error"`
	}
	switch err := json.Unmarshal(data, &ack); {
	case err != nil || ack.Error == nil && ack.Stream == "":
		return errors.New("what answers in the audit stream's place is none")
	case ack.Error != nil:
		return fmt.Errorf("the audit stream refuses: %s", ack.Error.Description)
	}
	return nil
}

func (l *Link) ask(ctx context.Context, what string, query any) (json.RawMessage, error) {
	nc, err := l.conn()
	if err != nil {
		return nil, err
	}
	return l.askOn(ctx, nc, what, query)
}

func (l *Link) askOn(ctx context.Context, nc *nats.Conn, what string, query any) (json.RawMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, l.o.Patience)
	defer cancel()
	m, err := nc.RequestWithContext(ctx, protocol.UpSubject(l.node, what), protocol.Encode(query))
	if errors.Is(err, nats.ErrNoResponders) {
		return nil, fmt.Errorf("the broker is there, but no controller listens: %w", err)
	} else if err != nil {
		return nil, err
	}
	reply, err := protocol.Decode[protocol.Reply](m.Data)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the controller's answer: %w", err)
	case reply.Version != protocol.Version:
		return nil, protocol.Refuse(protocol.OtherVersion, "the controller speaks version %d of the protocol, this agent version %d; upgrade the older one", reply.Version, protocol.Version)
	case reply.Refused != nil:
		return nil, reply.Refused
	}
	return reply.Body, nil
}
