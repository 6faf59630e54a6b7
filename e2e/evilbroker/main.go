//go:build linux

// Command evilbroker is what a broker that was broken into could become: it has the controller's TLS key, so
// that every agent takes it for the real one, asks nobody who they are, and lets anybody say anything anywhere.
package main

import (
	"crypto/tls"
	"fmt"
	"os"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "evilbroker:", err)
		os.Exit(1)
	}
}

func run() error {
	m, err := machine.Home{Dir: "/var/lib/nix-infra-controller", Role: protocol.Controller}.Open()
	if err != nil {
		return err
	}
	s, err := server.NewServer(&server.Options{
		Host: "0.0.0.0", Port: 4222, TLS: true, TLSTimeout: 10, MaxPayload: protocol.MaxMessage,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{*m.Certificate}, MinVersion: tls.VersionTLS13},
	})
	if err != nil {
		return err
	}
	s.Start()
	if !s.ReadyForConnections(10 * time.Second) {
		return fmt.Errorf("it does not listen")
	}
	s.WaitForShutdown()
	return nil
}
