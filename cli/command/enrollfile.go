package command

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// enrollFile signs a request that somebody brought. The answer may leave by stdout, so everything else
// is said on stderr.
func (a *app) enrollFile(ctx context.Context, name string, o enrollOptions) error {
	r, err := a.readRequest(o.request)
	if err != nil {
		return err
	}
	role := protocol.Node
	if o.controller {
		role = protocol.Controller
	}
	switch {
	case name != "" && r.Name != name:
		return fmt.Errorf("the request is for %s, not for %s", r.Name, name)
	case r.Role != role && role == protocol.Node:
		return fmt.Errorf("the request is a controller's; enroll it with --controller")
	case r.Role != role:
		return fmt.Errorf("the request is a node's; enroll it without --controller")
	}
	e, err := a.openEnrolment()
	if err != nil {
		return err
	}
	var fleet *session
	var before *protocol.NodeState
	var unreachable error
	if r.Role == protocol.Node && !o.offline {
		// Before anything is signed: two keys under one name would be two nodes with one identity.
		if fleet, before, unreachable = a.lookUp(ctx, e, r.Name); fleet != nil {
			defer fleet.Close()
		}
		if before != nil && before.Key != r.Key {
			return fmt.Errorf("a node %s with another key (%s) is enrolled; nothing was signed; if its machine was set up anew, remove it first: nix-infra node remove %s", r.Name, before.Key, r.Name)
		}
	}
	answer, err := e.Sign(r, hosts(r.Name, "", o.addresses, e.Controllers), time.Now())
	if err != nil {
		return err
	}
	if err := a.writeAnswer(o.answer, protocol.Encode(answer)); err != nil {
		return err
	}
	a.note("signed %s %s (key %s)", r.Role, r.Name, r.Key)
	if r.Role == protocol.Controller {
		return nil
	}
	if o.offline {
		a.note("the controller was not told of %s; run this again without --offline where it can be reached", r.Name)
		return nil
	}
	err = unreachable
	if err == nil {
		err = register(ctx, fleet, before, r, answer.User, "", o.tags)
	}
	if err != nil {
		return &outcome{Unanswered, fmt.Errorf("%s was signed, but the controller does not know it yet: %w; run the same command again when it can be reached", r.Name, err)}
	}
	a.note("the controller knows %s; give the answer to nix-infra-agent load -", r.Name)
	return nil
}

func (a *app) note(format string, args ...any) {
	fmt.Fprintln(a.Stderr, ui.Clean(fmt.Sprintf(format, args...))) // others may have a say in it: a broker, in an error
}

func (a *app) readRequest(path string) (*protocol.EnrolRequest, error) {
	in, from := a.Stdin, "stdin"
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("--request: %w", err)
		}
		defer f.Close()
		in, from = f, path
	}
	data, err := io.ReadAll(io.LimitReader(in, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("the request in %s: %w", from, err)
	}
	r, err := protocol.Decode[protocol.EnrolRequest](bytes.TrimSpace(data))
	if err != nil {
		return nil, fmt.Errorf("what %s holds is not the output of nix-infra-agent request: %w", from, err)
	}
	return &r, nil
}

func (a *app) writeAnswer(path string, data []byte) error {
	data = append(data, '\n')
	if path != "-" {
		return atomicfile.Write(path, data, 0o644)
	}
	_, err := a.Stdout.Write(data)
	return err
}

// lookUp connects and asks what the controller knows of a node. The connection is nil with an error.
func (a *app) lookUp(ctx context.Context, e *enrolment, name string) (*session, *protocol.NodeState, error) {
	c, err := a.connectAs(ctx, e.me)
	if err != nil {
		return nil, nil, err
	}
	before, err := known(ctx, c, name)
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	return c, before, nil
}
