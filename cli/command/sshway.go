package command

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// tunnels opens tunnels to one address of a node.
type tunnels struct {
	session *session
	node    *protocol.NodeState
	to      string
}

func (t *tunnels) open(ctx context.Context) (*tunnel.Conn, error) {
	c, _, err := t.session.Tunnel(ctx, &t.node.NodeRecord, t.session.me.verifier, t.to)
	if err != nil {
		return nil, fmt.Errorf("no tunnel to %s: %w", t.node.Name, err)
	}
	return c, nil
}

// giveUp ends a tunnel that was only looked at, and returns when the node was told.
func giveUp(c *tunnel.Conn) {
	c.Reset("it is not needed any more")
	select {
	case <-c.Done():
	case <-time.After(lastWords):
	}
}

// pin pins the host key that a node's sshd shows through a tunnel.
func (a *app) pin(ctx context.Context, to *tunnels) error {
	c, err := to.open(ctx)
	if err != nil {
		return err
	}
	defer giveUp(c)
	key, err := provision.HostKey(ctx, c)
	if err != nil {
		return fmt.Errorf("%s: %w", to.node.Name, err)
	}
	if err := provision.PinNode(a.own(knownHostsFile), to.node.Name, key); err != nil {
		return err
	}
	a.note("pinned the host key of %s: %s %s", to.node.Name, key.Type(), ssh.FingerprintSHA256(key))
	return nil
}

// serveSSH joins each connection to the socket with a tunnel; opened is the first one's.
func (a *app) serveSSH(ctx context.Context, socket net.Listener, to *tunnels, opened *tunnel.Conn) {
	var joined sync.WaitGroup
	defer joined.Wait()
	defer func() {
		if opened != nil {
			giveUp(opened)
		}
	}()
	stop := context.AfterFunc(ctx, func() { socket.Close() })
	defer stop()
	for {
		local, err := socket.Accept()
		if err != nil {
			return // it was closed
		}
		c := opened
		if opened = nil; c == nil {
			if c, err = to.open(ctx); err != nil {
				a.note("%s", message(err))
				local.Close()
				continue
			}
		}
		joined.Go(func() { _ = join(ctx, c, local.(*net.UnixConn), "ssh") }) // ssh itself says what it has against it
	}
}

// join has bytes go both ways until both directions have ended, or ctx has.
func join(ctx context.Context, c *tunnel.Conn, s tunnel.Stream, name string) error {
	stop := context.AfterFunc(ctx, func() { c.Reset("it was interrupted") })
	defer stop()
	return tunnel.Join(c, s, name)
}

// sshArguments are ssh's options. A node's host key is looked for nowhere but in the project, and nothing that the user has
// set up for other hosts leads around the tunnel.
func (a *app) sshArguments(socket, alias string, p *project.Project, o sshOptions) ([]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	known, err := filepath.Abs(a.own(knownHostsFile))
	if err != nil {
		return nil, err
	}
	options := []string{
		"ProxyCommand=" + percent(quoteWords([]string{self, "tunnel", "--socket", socket})),
		"HostKeyAlias=" + alias,
		"UserKnownHostsFile=" + percent(configWord(known)), "GlobalKnownHostsFile=/dev/null", "StrictHostKeyChecking=yes",
		"UpdateHostKeys=no", "CheckHostIP=no", "VerifyHostKeyDNS=no", "ControlMaster=no", "ControlPath=none",
	}
	if !o.asks {
		options = append(options, "BatchMode=yes")
	}
	keys := a.sshKeys(o.sshKey, p)
	if i := slices.IndexFunc(keys, func(file string) bool { _, err := os.Stat(file); return err == nil }); i >= 0 {
		options = append(options, "IdentityFile="+percent(configWord(keys[i])))
	} else if o.sshKey != "" {
		return nil, fmt.Errorf("there is no SSH key %s", strings.Join(keys, " or "))
	}
	var args []string
	for _, option := range options {
		args = append(args, "-o", option)
	}
	if o.tty {
		args = append(args, "-t")
	}
	return append(args, "-l", first(o.user, "root")), nil
}

// percent keeps ssh from reading a % as the beginning of something that it fills in.
func percent(s string) string { return strings.ReplaceAll(s, "%", "%%") }

// configWord is a word of ssh's configuration, whatever is in it.
func configWord(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}
