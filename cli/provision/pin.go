package provision

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// NodeAlias is the name that a node's host key is pinned under, by whatever address it is reached; ssh calls it
// HostKeyAlias. It can't be a host's name.
func NodeAlias(node string) string { return node + "@nix-infra" }

// PinNode pins a node's host key, in place of one that it had before. Who calls it knows that the key is the node's:
// the one with which it was enrolled, or the one that it shows through a tunnel, which ends at the node for certain.
func PinNode(file, node string, key ssh.PublicKey) error {
	pinning.Lock()
	defer pinning.Unlock()
	pinned, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	alias := NodeAlias(node)
	line := knownhosts.Line([]string{alias}, key)
	var others []byte
	known, other := false, false
	for l := range bytes.Lines(pinned) {
		switch text := strings.TrimRight(string(l), "\n"); {
		case text == line:
			known = true
		case strings.HasPrefix(text, alias+" "):
			other = true
		default:
			others = append(others, text+"\n"...)
		}
	}
	switch {
	case other:
		return atomicfile.Write(file, append(others, line+"\n"...), 0o644)
	case known:
		return nil
	}
	return appendLine(file, line)
}

// PinnedAs is the name under which a node's host key is pinned; "" where none is. Nodes that were enrolled before pins
// had the node's name are found by the address that they were enrolled at, where that is pinned once.
func PinnedAs(file, node, ipv4 string) (string, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	defer f.Close()
	alias, byAddress := NodeAlias(node), []string{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		_, hosts, _, _, _, err := ssh.ParseKnownHosts(lines.Bytes())
		if errors.Is(err, io.EOF) {
			continue // empty, or a comment
		} else if err != nil {
			return "", fmt.Errorf("%s: %w", file, err)
		}
		for _, h := range hosts {
			switch {
			case h == alias:
				return alias, nil
			case ipv4 != "" && (h == ipv4 || strings.HasPrefix(h, "["+ipv4+"]:")):
				byAddress = append(byAddress, h)
			}
		}
	}
	if byAddress = slices.Compact(byAddress); len(byAddress) == 1 {
		return byAddress[0], lines.Err()
	}
	return "", lines.Err()
}

// errSeen ends a connection that was made to see a host key.
var errSeen = errors.New("the host key was seen")

// HostKey is the key that the SSH server at the other end of conn shows, which it proves to have. Nothing is sent to it.
func HostKey(ctx context.Context, conn net.Conn) (ssh.PublicKey, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	var shown ssh.PublicKey
	_, _, _, err := ssh.NewClientConn(conn, "node", &ssh.ClientConfig{
		User: "nobody", HostKeyAlgorithms: hostKeyAlgorithms,
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error { shown = key; return errSeen },
	})
	if shown != nil {
		return shown, nil
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return nil, fmt.Errorf("no SSH server shows a host key: %w", err)
}
