package broker

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// Timing for fleets of thousands. A TLS handshake costs about a millisecond of CPU, so that after a
// restart the last of 10,000 agents waits well over the server's defaults of 2 s.
const (
	handshakeTimeout = 60 // seconds
	pingInterval     = 20 * time.Second
	maxPingsOut      = 3
	writeDeadline    = 10 * time.Second
	startTimeout     = 15 * time.Second
	maxAddresses     = 8
	syncInterval     = 10 * time.Second // what a loss of power may cost the audit stream
)

func startServer(cfg Config, m *machine.Machine, log *slog.Logger) (*server.Server, error) {
	opts, err := serverOptions(cfg, m)
	if err != nil {
		return nil, err
	}
	s, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("can't start the broker: %w", err)
	}
	bridge := &logger{log: log.With("part", "nats")}
	s.SetLoggerV2(bridge, false, false, false)
	s.Start()
	deadline := time.Now().Add(startTimeout)
	for !s.ReadyForConnections(100 * time.Millisecond) {
		fatal := bridge.fatal()
		if fatal == "" && time.Now().After(deadline) {
			fatal = fmt.Sprintf("not ready after %s", startTimeout)
		}
		if fatal != "" {
			s.Shutdown()
			s.WaitForShutdown()
			return nil, fmt.Errorf("can't start the broker (data in %s): %s", opts.StoreDir, fatal)
		}
	}
	if !s.JetStreamEnabled() {
		s.Shutdown()
		s.WaitForShutdown()
		return nil, fmt.Errorf("the broker can't use %s: %s; check the disk and the folder's owner", opts.StoreDir, bridge.last())
	}
	return s, nil
}

func serverOptions(cfg Config, m *machine.Machine) (*server.Options, error) {
	fleet := m.Answer.Fleet
	operator, err := jwt.DecodeOperatorClaims(fleet.OperatorJWT)
	if err != nil {
		return nil, fmt.Errorf("the operator JWT of the enrolment: %w", err)
	}
	if operator.Subject != fleet.Operator {
		return nil, fmt.Errorf("the operator JWT of the enrolment is of %s, the pinned operator is %s; enrol again", operator.Subject, fleet.Operator)
	}
	resolver, system, err := accounts(fleet)
	if err != nil {
		return nil, err
	}
	host, port, err := listenAddress("broker.listen", cfg.Listen)
	if err != nil {
		return nil, err
	}
	store := filepath.Join(cfg.Dir, "nats")
	if err := os.MkdirAll(store, 0o700); err != nil {
		return nil, fmt.Errorf("can't make the broker's folder: %w", err)
	}
	tlsConfig := &tls.Config{Certificates: []tls.Certificate{*m.Certificate}, MinVersion: tls.VersionTLS13}
	opts := &server.Options{
		ServerName: m.Name, Host: host, Port: port,
		TrustedOperators: []*jwt.OperatorClaims{operator}, AccountResolver: resolver, SystemAccount: system,
		TLSConfig: tlsConfig, TLS: true, TLSTimeout: handshakeTimeout, AuthTimeout: handshakeTimeout,
		PingInterval: pingInterval, MaxPingsOut: maxPingsOut, WriteDeadline: writeDeadline,
		MaxPayload: protocol.MaxMessage, MaxConn: cfg.MaxConnections,
		// Every message is with the kernel before it is acknowledged, which a kill -9 can't undo. What must
		// survive the loss of power, too, is flushed by Sync: a flush for each of a thousand manifests would
		// make their upload take seconds.
		JetStream: true, StoreDir: store, SyncInterval: syncInterval, DisableJetStreamBanner: true,
		// The server reserves a stream's bound up front and would refuse the audit stream on a small disk.
		JetStreamMaxStore: 1 << 50, JetStreamMaxMemory: 64 << 20,
		NoSigs: true, LameDuckDuration: time.Second, LameDuckGracePeriod: -time.Millisecond,
	}
	if cfg.Websocket != "" {
		if opts.Websocket.Host, opts.Websocket.Port, err = listenAddress("broker.websocket", cfg.Websocket); err != nil {
			return nil, err
		}
		opts.Websocket.TLSConfig = tlsConfig.Clone()
		opts.Websocket.AuthTimeout = handshakeTimeout
		opts.Websocket.HandshakeTimeout = handshakeTimeout * time.Second
	}
	return opts, nil
}

// accounts is the resolver with the fleet's account and the system account, and the latter's key.
func accounts(fleet protocol.Public) (*server.MemAccResolver, string, error) {
	resolver := &server.MemAccResolver{}
	var last string
	for _, token := range []string{fleet.AccountJWT, fleet.SystemJWT} {
		c, err := jwt.DecodeAccountClaims(token)
		if err != nil {
			return nil, "", fmt.Errorf("an account JWT of the enrolment: %w", err)
		}
		if c.Issuer != fleet.Operator {
			return nil, "", fmt.Errorf("account %s of the enrolment was not signed by the pinned operator; enrol again", c.Name)
		}
		if err := resolver.Store(c.Subject, token); err != nil {
			return nil, "", err
		}
		last = c.Subject
	}
	return resolver, last, nil
}

// SetAccount has the embedded server go by another account JWT of the fleet, whose signature was verified: it ends the
// connections of those who were revoked. An external broker is for those who run it: false.
func (b *Broker) SetAccount(token string) (bool, error) {
	if b.server == nil {
		return false, nil
	}
	c, err := jwt.DecodeAccountClaims(token)
	if err != nil {
		return true, err
	}
	if err := b.server.AccountResolver().Store(c.Subject, token); err != nil {
		return true, fmt.Errorf("the embedded broker does not take the account JWT: %w", err)
	}
	account, err := b.server.LookupAccount(c.Subject)
	if err != nil {
		return true, fmt.Errorf("the embedded broker does not know the fleet's account: %w", err)
	}
	b.server.UpdateAccountClaims(account, c)
	return true, nil
}

// Addresses are from where somebody is connected, by their public key: IP addresses with commas between, "" where nobody is
// or the broker is external. Behind a proxy it is the proxy's. Which of several connections said something isn't known.
func (b *Broker) Addresses(key string) string {
	if b.server == nil {
		return ""
	}
	list, err := b.server.Connz(&server.ConnzOptions{Username: true, User: key, Limit: maxAddresses})
	if err != nil {
		return ""
	}
	var all []string
	for _, c := range list.Conns {
		all = append(all, c.IP)
	}
	slices.Sort(all)
	return strings.Join(slices.Compact(all), ", ")
}

// listenAddress splits host:port and tries it, because the server's own error comes too late and
// does not name the setting. Port 0 is any free one.
func listenAddress(setting, address string) (string, int, error) {
	host, p, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, fmt.Errorf("%s %q is not host:port: %w", setting, address, err)
	}
	port, err := strconv.Atoi(p)
	if err != nil || port < 0 || port > 65535 {
		return "", 0, fmt.Errorf("%s %q has no valid port", setting, address)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return "", 0, fmt.Errorf("can't listen on %s of %s (in use, or not allowed; choose another in controller.yaml): %w", address, setting, err)
	}
	if err := l.Close(); err != nil {
		return "", 0, err
	}
	if port == 0 {
		port = server.RANDOM_PORT
	}
	return host, port, nil
}

// reachable turns a bound address into one that can be dialled on this machine.
func reachable(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}
