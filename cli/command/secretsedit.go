package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

func (a *app) secretsEditCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "edit NAME",
		Short: "Change a secret in an editor",
		Long: `Change a secret in an editor ($VISUAL, else $EDITOR), or write a new one. Meanwhile it is in a file that only you can
read, in memory (a tmpfs), and gone afterwards; where there is no such place, it is refused. What your editor keeps
elsewhere, such as an undo history, is up to the editor.`,
		Example: `  nix-infra secrets edit app.env`,
		Args:    cobra.ExactArgs(1),
		RunE:    func(c *cobra.Command, args []string) error { return a.secretsEdit(c.Context(), args[0]) },
	}
}

func (a *app) secretsEdit(ctx context.Context, name string) error {
	if err := protocol.CheckSecretName(name); err != nil {
		return err
	}
	p, err := a.openProject()
	if err != nil {
		return err
	}
	// The user's own: a project says nothing about which programs run here, nor where a secret lies in clear.
	editor := strings.Fields(first(a.Getenv("VISUAL"), a.Getenv("EDITOR")))
	if len(editor) == 0 {
		return errors.New("with which editor? Set VISUAL or EDITOR, such as EDITOR=vi")
	}
	memory, err := memoryDir(a.Getenv("XDG_RUNTIME_DIR"), "/dev/shm")
	if err != nil {
		return err
	}
	s := a.secretStore(p)
	var before []byte
	if s.Has(name) {
		if before, err = s.Get(name); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp(memory, "nix-infra-edit-") // for its owner only
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, name)
	if err := os.WriteFile(file, before, 0o600); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, editor[0], append(editor[1:], file)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.Stdin, a.Stdout, a.Stderr
	if err := cmd.Run(); ctx.Err() != nil {
		return ctx.Err()
	} else if err != nil {
		return fmt.Errorf("%s: %w; nothing was stored", editor[0], err)
	}
	after, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if after = oneLine(after); bytes.Equal(before, after) {
		a.say("secret %s stays as it is\n", name)
		return nil
	}
	if err := s.Put(name, after); err != nil {
		return err
	}
	a.say("stored secret %s\n", name)
	return nil
}

// memoryDir is the first of some folders whose files are in memory and on no disk.
func memoryDir(candidates ...string) (string, error) {
	for _, dir := range candidates {
		var fs unix.Statfs_t
		if dir != "" && unix.Statfs(dir, &fs) == nil && isMemory(&fs) && unix.Access(dir, unix.W_OK) == nil {
			return dir, nil
		}
	}
	return "", errors.New("there is no folder in memory (a tmpfs at $XDG_RUNTIME_DIR or /dev/shm), and a disk is no place for a secret; use secrets show and store")
}
