package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

// addPrograms puts the programs that a node's facts name into this machine's store: its system refers to them by their
// content, as they are in the node's own. What this CLI would enrol a machine with is the same content where the node was
// enrolled with this version.
func (b *building) addPrograms(ctx context.Context) error {
	data, there := b.own[protocol.FactsFile]
	if !there {
		if b.has(protocol.ModuleFile) {
			return fmt.Errorf("its agent tells no facts, without which its system would have no agent; `nix-infra logs %s --unit nix-infra-agent` may say why, and an older agent is replaced by enrolling the machine again", b.node)
		}
		return nil
	}
	facts, err := protocol.Decode[protocol.NodeFacts](data)
	if err != nil {
		return fmt.Errorf("its facts: %w", err)
	}
	for _, p := range []struct {
		wanted *protocol.StoredProgram
		ours   provision.Program
	}{{facts.Agent, provision.Agent}, {facts.Controller, provision.Controller}} {
		if p.wanted == nil {
			continue
		}
		if err := b.addProgram(ctx, p.ours, *p.wanted, strings.TrimSuffix(facts.System, "-linux")); err != nil {
			return fmt.Errorf("%w; have the node build its system: --build=node", err)
		}
	}
	return nil
}

func (b *building) addProgram(ctx context.Context, ours provision.Program, wanted protocol.StoredProgram, machine string) error {
	if wanted.Name != ours.Name {
		return fmt.Errorf("its facts have a program %.64q, which is not %s", wanted.Name, ours.Name)
	}
	file, err := ours.FindBinary(machine)
	if err != nil {
		return err
	}
	work := b.dir + ".programs"
	folder := filepath.Join(work, ours.Name)
	if err := copyFile(filepath.Join(folder, "bin", ours.Name), file); err != nil {
		return err
	}
	added, err := nix.AddFixed(ctx, folder)
	if err != nil {
		return err
	}
	if added.Hash != wanted.Hash {
		return fmt.Errorf("the node has another %s than %s, so its system can't be built here; enrol it again, which gives it this one", ours.Name, file)
	}
	return nil
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
