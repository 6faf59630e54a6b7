package provision

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// keys are the private keys to try.
func (t Target) keys() ([]ssh.Signer, func(), error) {
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
	return signers, done, nil
}

// noted is a key that says when it was used: a server asks only for the signature of one that it accepts.
type noted struct {
	ssh.AlgorithmSigner
	used *ssh.PublicKey
}

func noting(keys []ssh.Signer, used *ssh.PublicKey) []ssh.Signer {
	all := make([]ssh.Signer, len(keys))
	for i, k := range keys {
		all[i] = k
		if a, ok := k.(ssh.AlgorithmSigner); ok { // all that there are
			all[i] = noted{a, used}
		}
	}
	return all
}

func (n noted) Sign(random io.Reader, data []byte) (*ssh.Signature, error) {
	*n.used = n.PublicKey()
	return n.AlgorithmSigner.Sign(random, data)
}

func (n noted) SignWithAlgorithm(random io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	*n.used = n.PublicKey()
	return n.AlgorithmSigner.SignWithAlgorithm(random, data, algorithm)
}
