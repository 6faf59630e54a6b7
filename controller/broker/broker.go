// Package broker gives the controller its NATS: the server embedded in this process, or an external
// one, and on it what has to last: the blobs and the audit stream.
//
// The server runs in operator mode. It holds public keys only, so whoever breaks into it can withhold
// messages and not forge any.
package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// Config says which broker to use.
type Config struct {
	Dir            string   // where the embedded server keeps its data
	Listen         string   // host:port for tls://
	Websocket      string   // host:port for wss://; "" disables
	MaxConnections int      // 0: the server's default, 65536
	External       []string // URLs of another broker; then nothing is embedded
	MaxBlobs       int64    // bytes that all blobs together may take; 0: no bound
}

// Broker is the controller's connection and, where it is embedded, the server behind it.
type Broker struct {
	Conn  *nats.Conn
	JS    jetstream.JetStream
	Blobs *Blobs
	Audit jetstream.Stream

	server *server.Server // nil: external
	dir    string
}

// AuditStream is the JetStream stream of all audit records.
const AuditStream = "AUDIT"

const auditBytes = 1 << 30

// Start starts or reaches the broker and makes sure of what is kept on it.
func Start(ctx context.Context, cfg Config, m *machine.Machine, log *slog.Logger) (*Broker, error) {
	b := &Broker{dir: cfg.Dir}
	var err error
	if len(cfg.External) == 0 {
		if b.server, err = startServer(cfg, m, log); err != nil {
			return nil, err
		}
	}
	if b.Conn, err = b.connect(cfg, m, log); err != nil {
		b.Stop()
		return nil, err
	}
	if err := b.prepare(ctx, cfg); err != nil {
		b.Stop()
		return nil, err
	}
	return b, nil
}

func (b *Broker) connect(cfg Config, m *machine.Machine, log *slog.Logger) (*nats.Conn, error) {
	to := connect.To{
		URLs: cfg.External, CA: m.Answer.CA, Signer: m.Signer(), Name: "controller " + m.Name,
		InboxPrefix: protocol.ControllerInbox(m.Name), Timeout: 5 * time.Second,
	}
	extra := []nats.Option{
		nats.MaxReconnects(-1),
		nats.ReconnectWait(500 * time.Millisecond),
		nats.ErrorHandler(func(_ *nats.Conn, s *nats.Subscription, err error) {
			subject := ""
			if s != nil {
				subject = s.Subject
			}
			log.Warn("broker", "error", err, "subject", subject)
		}),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("lost the broker", "error", err)
			}
		}),
		nats.ReconnectHandler(func(*nats.Conn) { log.Info("back at the broker") }),
	}
	if b.server == nil {
		nc, err := to.Dial(extra...)
		if err != nil {
			return nil, fmt.Errorf("can't reach the broker of broker.external: %w", err)
		}
		return nc, nil
	}
	options, err := to.Options()
	if err != nil {
		return nil, err
	}
	// In-process there is no wire to protect; the server offers no TLS there.
	nc, err := nats.Connect("", append(append(options, extra...), nats.InProcessServer(b.server))...)
	if err != nil {
		return nil, fmt.Errorf("the embedded broker does not accept this controller's own credentials (enrol it again): %w", err)
	}
	return nc, nil
}

func (b *Broker) prepare(ctx context.Context, cfg Config) (err error) {
	if b.JS, err = jetstream.New(b.Conn); err != nil {
		return err
	}
	b.Audit, err = b.JS.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name:        AuditStream,
		Description: "who ordered what, hash-chained by each writer",
		Subjects:    protocol.AuditSubjects,
		Storage:     jetstream.FileStorage,
		Discard:     jetstream.DiscardOld,
		MaxBytes:    auditBytes,
		MaxMsgSize:  64 << 10,
	})
	if err != nil {
		return fmt.Errorf("can't make the audit stream: %w", err)
	}
	b.Blobs, err = openBlobs(ctx, b.JS, cfg.MaxBlobs)
	return err
}

// Sync makes all that the embedded broker acknowledged survive a loss of power. An external one has its
// own settings for that.
func (b *Broker) Sync() error {
	if b.server == nil {
		return nil
	}
	d, err := os.Open(b.dir)
	if err != nil {
		return fmt.Errorf("can't flush the disk: %w", err)
	}
	defer d.Close()
	// The server has no call for it, and its files are its own business: flush their file system.
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("can't flush the disk of %s: %w", b.dir, err)
	}
	return nil
}

// Healthy is nil while the broker answers and stores.
func (b *Broker) Healthy(ctx context.Context) error {
	if b.server != nil && !b.server.JetStreamEnabled() {
		return errors.New("JetStream has stopped; is the disk full?")
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return b.Conn.FlushWithContext(ctx)
}

// ClientURL is where agents and the CLI connect by TLS, "" where the broker is external.
func (b *Broker) ClientURL() string {
	if b.server == nil {
		return ""
	}
	return "tls://" + reachable(b.server.Addr().String())
}

// WebsocketURL is the same for secure websockets, "" where there is none.
func (b *Broker) WebsocketURL() string {
	if b.server == nil {
		return ""
	}
	return b.server.WebsocketURL()
}

// Stop closes the connection and the embedded server. Subscriptions must be drained before.
func (b *Broker) Stop() {
	if b.Conn != nil {
		b.Conn.Close()
	}
	if b.server != nil {
		b.server.Shutdown()
		b.server.WaitForShutdown()
	}
}
