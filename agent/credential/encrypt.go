package credential

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/nix"
)

const encryptTime = time.Minute // a TPM takes its time

// Encrypt has systemd-creds encrypt a value for this machine alone, by its TPM where it has one, and else by the key
// that systemd keeps for it. The value goes through a pipe.
func Encrypt(ctx context.Context, name string, value []byte) ([]byte, error) {
	program, err := nix.LookPath("systemd-creds")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, encryptTime)
	defer cancel()
	c := exec.CommandContext(ctx, program, "encrypt", "--name="+name, "--with-key=auto", "-", "-")
	var out, log bytes.Buffer
	c.Stdin, c.Stdout, c.Stderr = bytes.NewReader(value), &out, &log
	c.WaitDelay = time.Second
	err = nix.Run(c)
	if err == nil && out.Len() == 0 {
		err = fmt.Errorf("it printed nothing")
	}
	if err != nil {
		lines := strings.Split(strings.TrimSpace(log.String()), "\n")
		return nil, fmt.Errorf("systemd-creds: %w: %.300s", err, lines[len(lines)-1])
	}
	return out.Bytes(), nil
}
