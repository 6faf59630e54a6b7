package command

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/spf13/pflag"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/bundle"
)

// bundleFlags have a deployment written into a file, for nix-infra-agent apply on the node.
type bundleFlags struct {
	out     string
	offline bool
	serial  uint64
}

func (b *bundleFlags) register(f *pflag.FlagSet) {
	f.StringVar(&b.out, "out", "", "deploy nothing, but write it into a `file` for nix-infra-agent apply on the node (one node)")
	f.BoolVar(&b.offline, "offline", false, "with --out: ask no controller; what is known of nodes is what the project says")
	f.Uint64Var(&b.serial, "serial", 0, "with --offline: the manifest's `number`, above the one that nix-infra-agent status shows on the node")
}

func (b *bundleFlags) check(o *deployOptions) error {
	switch {
	case b.out == "" && (b.offline || b.serial != 0):
		return errors.New("--offline and --serial go with --out: without a controller, a deployment can only be written into a file")
	case b.offline && (b.serial == 0 || b.serial >= plausibleSerial(time.Now())):
		return errors.New("--offline needs --serial N: one more than the serial that nix-infra-agent status shows on the node (1 if it never had a deployment)")
	case b.offline && o.where == here:
		return errors.New("--build=local asks the node for the files that belong to it, so it can't be --offline; use --build=node or --build=cache")
	case b.serial != 0 && !b.offline:
		return errors.New("--serial goes with --offline: the controller knows which one is next")
	case b.out != "" && o.mode == string(protocol.DryActivate):
		return errors.New("a dry-activate can't be written into a file: it is good for a few minutes only")
	case b.out != "" && (o.detach || !reflect.DeepEqual(o.Rollout, project.Rollout{})):
		return errors.New("--out writes a file for one node: there is no rollout, so --canary, --batch, --at, --detach and the like don't go with it")
	}
	return nil
}

// offlineNode is the node that is named, by what the project knows.
func (a *app) offlineNode(o *deployOptions) (protocol.NodeState, error) {
	if len(o.targets) != 1 || project.ValidNodeName(o.targets[0]) != nil {
		return protocol.NodeState{}, errors.New("--offline takes the name of one node: without a controller, nothing is known that a selector could ask for")
	}
	name := o.targets[0]
	jwt, err := os.ReadFile(a.own(nodesDir, name+".jwt"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return protocol.NodeState{}, err
	}
	return protocol.NodeState{NodeRecord: protocol.NodeRecord{Name: name, JWT: strings.TrimSpace(string(jwt))}, Serial: o.serial - 1}, nil
}

// deployToFile writes the deployment of one node into a file. Nobody is told of it.
func (a *app) deployToFile(ctx context.Context, me *identity, order order, o *deployOptions) error {
	order.strategy = protocol.Strategy{}
	var s *session
	var chosen, all []protocol.NodeState
	if o.offline {
		n, err := a.offlineNode(o)
		if err != nil {
			return err
		}
		chosen = []protocol.NodeState{n}
		all = chosen
	} else {
		var err error
		if s, err = a.connectAs(ctx, me); err != nil {
			return fmt.Errorf("%w; without a controller, add --offline --serial N", err)
		}
		defer s.Close()
		if chosen, all, err = a.choose(ctx, s, o.targets, order.mode); err != nil {
			return err
		}
		if len(chosen) != 1 {
			return fmt.Errorf("--out writes a file for one node, and the targets name %d", len(chosen))
		}
	}
	from, err := a.sourceFor(ctx, me, s, o, chosen, all)
	if err != nil {
		return err
	}
	p, err := makePlan(me.signer, order, chosen, from, time.Now())
	if err != nil && o.offline {
		return fmt.Errorf("%w (with --offline, nodes are known by %s and %s only)", err, project.SettingsFile, project.ServersFile)
	} else if err != nil {
		return err
	}
	return a.writeBundle(p, o.out)
}

// bundleDocument is the file that was written, in `deploy --out --json`.
type bundleDocument struct {
	Event      string `json:"event"` // bundle
	Deployment string `json:"deployment"`
	Node       string `json:"node"`
	Serial     uint64 `json:"serial"`
	File       string `json:"file"`
	Bytes      int64  `json:"bytes"`
}

// writeBundle writes the plan of one node.
func (a *app) writeBundle(p *plan, file string) error {
	for _, w := range p.warnings {
		a.note("warning: %s", ui.Clean(w))
	}
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		return err
	}
	defer encoder.Close()
	item := p.request.Items[0]
	err = bundle.Write(file, p.blobs[item.Digest], func(digest string) ([]byte, error) {
		return encoder.EncodeAll(p.blobs[digest], nil), nil
	})
	if err != nil {
		return fmt.Errorf("can't write the deployment into %s: %w", file, err)
	}
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	if a.json {
		a.document(bundleDocument{"bundle", p.request.Deployment, item.Node, item.Serial, file, info.Size()})
	}
	a.say("wrote %s: deployment %s of %s, serial %d, %s\nbring it to %s and run there, as root: nix-infra-agent apply %s\n",
		file, p.request.Deployment, item.Node, item.Serial, size(info.Size()), item.Node, file)
	return nil
}
