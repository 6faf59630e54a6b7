//go:build linux

// Command hub is what a fleet with several controllers shares: a nats-server in operator mode, with JetStream and TLS,
// on port 4222, and an etcd on port 2379. Both are the real ones. It has the identity of an enrolled controller, for its
// certificate and the fleet's public keys.
//
//	hub DIR HOST
package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

const readyWithin = 30 * time.Second

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: hub DIR HOST")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "hub:", err)
		os.Exit(1)
	}
}

func run(dir, host string) error {
	m, err := machine.Home{Dir: dir, Role: protocol.Controller}.Open()
	if err != nil {
		return err
	}
	etcd, err := startEtcd(filepath.Join(dir, "etcd"), host)
	if err != nil {
		return fmt.Errorf("etcd: %w", err)
	}
	defer etcd.Close()
	broker, err := startBroker(filepath.Join(dir, "nats"), host, m)
	if err != nil {
		return fmt.Errorf("nats: %w", err)
	}
	fmt.Println("ready")
	go broker.WaitForShutdown()
	return <-etcd.Err()
}

func startEtcd(dir, host string) (*embed.Etcd, error) {
	c := embed.NewConfig()
	c.Dir = dir
	client, peer := at(host, "2379"), at(host, "2380")
	c.ListenClientUrls, c.AdvertiseClientUrls = client, client
	c.ListenPeerUrls, c.AdvertisePeerUrls = peer, peer
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.LogLevel = "warn"
	e, err := embed.StartEtcd(c)
	if err != nil {
		return nil, err
	}
	select {
	case <-e.Server.ReadyNotify():
		return e, nil
	case err = <-e.Err():
	case <-time.After(readyWithin):
		err = fmt.Errorf("not ready after %s", readyWithin)
	}
	e.Close()
	return nil, err
}

func at(host, port string) []url.URL {
	return []url.URL{{Scheme: "http", Host: net.JoinHostPort(host, port)}}
}

func startBroker(dir, host string, m *machine.Machine) (*server.Server, error) {
	fleet := m.Answer.Fleet
	operator, err := jwt.DecodeOperatorClaims(fleet.OperatorJWT)
	if err != nil {
		return nil, err
	}
	accounts := &server.MemAccResolver{}
	for _, token := range []string{fleet.AccountJWT, fleet.SystemJWT} {
		c, err := jwt.DecodeAccountClaims(token)
		if err != nil {
			return nil, err
		}
		if err := accounts.Store(c.Subject, token); err != nil {
			return nil, err
		}
	}
	s, err := server.NewServer(&server.Options{
		ServerName: m.Name, Host: host, Port: 4222,
		TrustedOperators: []*jwt.OperatorClaims{operator}, SystemAccount: operator.SystemAccount, AccountResolver: accounts,
		TLS: true, TLSTimeout: 10, AuthTimeout: 10, TLSConfig: &tls.Config{Certificates: []tls.Certificate{*m.Certificate}, MinVersion: tls.VersionTLS13},
		JetStream: true, StoreDir: dir, JetStreamMaxStore: 1 << 40, MaxPayload: protocol.MaxMessage,
	})
	if err != nil {
		return nil, err
	}
	s.ConfigureLogger()
	s.Start()
	if !s.ReadyForConnections(readyWithin) || !s.JetStreamEnabled() {
		s.Shutdown()
		return nil, errors.New("it does not listen, or has no JetStream")
	}
	return s, nil
}
