package provision

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/crypto/ssh/knownhosts"
)

// Target is a machine as SSH reaches it.
type Target struct {
	User string
	Host string
	Port int

	KeyFiles    []string // private keys; ones that don't exist are left out
	AgentSocket string   // of ssh-agent; "": none
	KnownHosts  string   // file with the pinned host keys, made when it is missing
	Timeout     time.Duration
}

// ParseTarget reads [user@]host[:port]; an IPv6 address with a port stands in brackets.
func ParseTarget(s string) (Target, error) {
	t := Target{User: "root", Port: 22, Timeout: 15 * time.Second}
	rest := s
	if user, host, ok := strings.Cut(s, "@"); ok {
		t.User, rest = user, host
	}
	t.Host = rest
	if host, port, err := net.SplitHostPort(rest); err == nil {
		if t.Port, err = strconv.Atoi(port); err != nil || t.Port < 1 || t.Port > 65535 {
			return Target{}, fmt.Errorf("--ssh %q: port %q is not a number from 1 to 65535", s, port)
		}
		t.Host = host
	}
	t.Host = strings.TrimSuffix(strings.TrimPrefix(t.Host, "["), "]")
	if t.User == "" || t.Host == "" || strings.HasPrefix(t.Host, "-") || strings.ContainsAny(s, " \t\n/'\"") {
		return Target{}, fmt.Errorf("--ssh %q: expected [user@]host[:port]", s)
	}
	return t, nil
}

// Address is host:port.
func (t Target) Address() string { return net.JoinHostPort(t.Host, strconv.Itoa(t.Port)) }

// Machine is an open SSH connection on which commands run as root.
type Machine struct {
	HostKey ssh.PublicKey

	client *ssh.Client
	sudo   bool
}

// Dial connects. The host's key is pinned at the first contact that succeeds; later, a machine with
// another key is refused.
func Dial(ctx context.Context, t Target) (*Machine, error) {
	auth, closeAgent, err := t.auth()
	if err != nil {
		return nil, err
	}
	defer closeAgent()
	pins, err := t.pins()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, t.Timeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", t.Address())
	if err != nil {
		return nil, fmt.Errorf("can't reach %s: %w", t.Address(), err)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	c, channels, requests, err := ssh.NewClientConn(conn, t.Address(), &ssh.ClientConfig{
		User: t.User, Auth: auth, HostKeyCallback: pins.check, HostKeyAlgorithms: pins.algorithms,
	})
	if err != nil {
		conn.Close()
		return nil, t.explain(err)
	}
	if err := pins.keep(); err != nil {
		c.Close()
		return nil, err
	}
	return &Machine{HostKey: pins.shown, client: ssh.NewClient(c, channels, requests), sudo: t.User != "root"}, nil
}

// Close ends the connection.
func (m *Machine) Close() error { return m.client.Close() }

// errChangedHost is a host that is not the one that was pinned.
type errChangedHost struct{ reason string }

func (e *errChangedHost) Error() string { return e.reason }

func (t Target) explain(err error) error {
	var changed *errChangedHost
	switch {
	case errors.As(err, &changed):
		return changed
	case strings.Contains(err.Error(), "unable to authenticate"):
		return fmt.Errorf("%s@%s does not accept any of the keys (%s, ssh-agent); put the project's public key into its authorized_keys, or give --ssh-key",
			t.User, t.Address(), strings.Join(t.KeyFiles, ", "))
	}
	return fmt.Errorf("no SSH with %s: %w", t.Address(), err)
}

func (t Target) auth() ([]ssh.AuthMethod, func(), error) {
	var signers []ssh.Signer
	for _, file := range t.KeyFiles {
		data, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, nil, err
		}
		s, err := ssh.ParsePrivateKey(data)
		var locked *ssh.PassphraseMissingError
		if errors.As(err, &locked) {
			continue // ssh-agent may hold it
		} else if err != nil {
			return nil, nil, fmt.Errorf("SSH key %s: %w", file, err)
		}
		signers = append(signers, s)
	}
	done := func() {}
	if t.AgentSocket != "" {
		if conn, err := net.DialTimeout("unix", t.AgentSocket, 2*time.Second); err == nil {
			done = func() { conn.Close() }
			if held, err := agent.NewClient(conn).Signers(); err == nil {
				signers = append(signers, held...)
			}
		}
	}
	if len(signers) == 0 {
		done()
		return nil, nil, fmt.Errorf("no usable SSH key: looked at %s and ssh-agent; give --ssh-key", strings.Join(t.KeyFiles, ", "))
	}
	return []ssh.AuthMethod{ssh.PublicKeys(signers...)}, done, nil
}

// pins is what is known of a host's key.
type pins struct {
	target     Target
	known      ssh.HostKeyCallback
	algorithms []string // nil: any
	shown      ssh.PublicKey
	fresh      ssh.PublicKey // the one that was shown, where none was pinned
}

func (t Target) pins() (*pins, error) {
	f, err := os.OpenFile(t.KnownHosts, os.O_RDONLY|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	f.Close()
	known, err := knownhosts.New(t.KnownHosts)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.KnownHosts, err)
	}
	p := &pins{target: t, known: known}
	for _, k := range p.wanted() {
		// A host has keys of several types. Ask for the type that is pinned, else another one would
		// look like a change.
		if k.Key.Type() == ssh.KeyAlgoRSA {
			p.algorithms = append(p.algorithms, ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256)
		} else {
			p.algorithms = append(p.algorithms, k.Key.Type())
		}
	}
	if p.algorithms == nil {
		p.algorithms = hostKeyAlgorithms
	}
	return p, nil
}

// hostKeyAlgorithms are what a host that is not known yet may show, the best first.
var hostKeyAlgorithms = []string{ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521, ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}

// wanted are the pinned keys of the host, which knownhosts only tells when it is shown a wrong one.
func (p *pins) wanted() []knownhosts.KnownKey {
	wrong, err := ssh.NewPublicKey(ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)))
	if err != nil {
		return nil
	}
	var key *knownhosts.KeyError
	if errors.As(p.known(p.target.Address(), &net.TCPAddr{IP: net.IPv4zero}, wrong), &key) {
		return key.Want
	}
	return nil
}

func (p *pins) check(address string, remote net.Addr, key ssh.PublicKey) error {
	p.shown = key
	err := p.known(address, remote, key)
	var wrong *knownhosts.KeyError
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &wrong):
		return err
	case len(wrong.Want) == 0:
		p.fresh = key
		return nil
	}
	return &errChangedHost{fmt.Sprintf("%s shows another host key (%s) than the one pinned in %s, line %d: either the machine was reinstalled, "+
		"then remove that line, or somebody stands between; nothing was sent", address, ssh.FingerprintSHA256(key), p.target.KnownHosts, wrong.Want[0].Line)}
}

// keep pins the key of a first contact. It appends, as ssh does, so that of two who enrol at once none takes the
// other's pin away.
func (p *pins) keep() error {
	if p.fresh == nil {
		return nil
	}
	return appendLine(p.target.KnownHosts, knownhosts.Line([]string{p.target.Address()}, p.fresh))
}

func appendLine(file, line string) error {
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(old) > 0 && !bytes.HasSuffix(old, []byte("\n")) {
		line = "\n" + line
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line + "\n")
	return errors.Join(err, f.Close())
}

// Run runs a command as root and gives its output. An error carries the end of what it said.
func (m *Machine) Run(ctx context.Context, stdin io.Reader, argv ...string) ([]byte, error) {
	session, err := m.client.NewSession()
	if err != nil {
		return nil, err
	}
	defer session.Close()
	stop := context.AfterFunc(ctx, func() { session.Close() })
	defer stop()
	out, said := &bounded{limit: 4 << 20}, &bounded{limit: 64 << 10}
	session.Stdin, session.Stdout, session.Stderr = stdin, out, said
	if m.sudo {
		argv = slices.Concat([]string{"sudo", "-n", "--"}, argv)
	}
	if err := session.Run(quote(argv)); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if text := lastLines(said.String(), 3); text != "" {
			return nil, fmt.Errorf("%w: %s", err, text)
		}
		return nil, err
	}
	if out.full {
		return nil, fmt.Errorf("%s said more than %d bytes", argv[0], out.limit)
	}
	return out.Bytes(), nil
}

// quote makes one command line of argv for the remote shell, which SSH can't do without.
func quote(argv []string) string {
	words := make([]string, len(argv))
	for i, a := range argv {
		words[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	return strings.Join(words, " ")
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

// bounded keeps the first bytes of an output.
type bounded struct {
	bytes.Buffer
	limit int
	full  bool
}

func (b *bounded) Write(p []byte) (int, error) {
	room := b.limit - b.Len()
	if len(p) > room {
		b.full = true
		b.Buffer.Write(p[:max(0, room)])
		return len(p), nil
	}
	return b.Buffer.Write(p)
}
