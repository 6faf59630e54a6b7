package provision

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// pins is what is known of a host's key.
type pins struct {
	target     Target
	known      ssh.HostKeyCallback
	name       string   // under which it is pinned, with a port
	algorithms []string // nil: any
	shown      ssh.PublicKey
	fresh      ssh.PublicKey // the one that was shown, where none was pinned
}

func (t Target) pins() (*pins, error) {
	pinning.Lock() // of a line that is being written, some would be read
	defer pinning.Unlock()
	f, err := os.OpenFile(t.KnownHosts, os.O_RDONLY|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	f.Close()
	known, err := knownhosts.New(t.KnownHosts)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.KnownHosts, err)
	}
	p := &pins{target: t, known: known, name: t.Address()}
	if t.Node != "" {
		// By the node's name where it was pinned so: addresses wander. Else by its address, as it may have been before it had a name.
		byName := &pins{target: t, known: known, name: NodeAlias(t.Node) + ":22"}
		if len(byName.wanted()) > 0 || len(p.wanted()) == 0 {
			p = byName
		}
	}
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

// nowhere is no machine's address: knownhosts would look for the key of an address, too.
var nowhere = &net.TCPAddr{IP: net.IPv4zero}

// wanted are the pinned keys of the host, which knownhosts only tells when it is shown a wrong one.
func (p *pins) wanted() []knownhosts.KnownKey {
	wrong, err := ssh.NewPublicKey(ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)))
	if err != nil {
		return nil
	}
	var key *knownhosts.KeyError
	if errors.As(p.known(p.name, nowhere, wrong), &key) {
		return key.Want
	}
	return nil
}

func (p *pins) check(address string, _ net.Addr, key ssh.PublicKey) error {
	p.shown = key
	err := p.known(p.name, nowhere, key)
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

// keep pins the key of a first contact, unless somebody else has meanwhile: many machines may come through the same host. It
// appends, as ssh does, so that of two who enrol at once none takes the other's pin away.
func (p *pins) keep() error {
	if p.fresh == nil {
		return nil
	}
	pinning.Lock()
	defer pinning.Unlock()
	var err error
	if p.known, err = knownhosts.New(p.target.KnownHosts); err != nil {
		return fmt.Errorf("%s: %w", p.target.KnownHosts, err)
	}
	key := p.fresh
	p.fresh = nil
	if err := p.check(p.target.Address(), nil, key); err != nil || p.fresh == nil {
		return err
	}
	return appendLine(p.target.KnownHosts, knownhosts.Line([]string{knownhosts.Normalize(p.name)}, key))
}

// pinning has one at a time write pins, or read them: machines come in many at once.
var pinning sync.Mutex

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

// CheckNode tells whether a key is the pinned one of a node.
func CheckNode(file, node string, key ssh.PublicKey) error {
	pins, err := Target{Node: node, Host: node, Port: 22, KnownHosts: file}.pins()
	if err != nil {
		return err
	}
	return pins.check(node, nil, key)
}
