package dev

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/mcp/session"
)

const (
	environmentTool = "test-environment"
	labCommand      = "nix-infra-lab" // where it is on PATH
	maxLabNodes     = 8
)

type environmentInput struct {
	Operation   string `json:"operation" enum:"create,reset,status,teardown,destroy,get_output,list_sessions,cancel" jsonschema:"create, reset, status or teardown (destroy is the same), which begin a session; or look after one: get_output, list_sessions, cancel"`
	Environment string `json:"environment,omitempty" enum:"project,lab" jsonschema:"project: by the project's own __test__/run-tests.sh, which may make machines that cost money; lab: nodes on this machine, which don't. The default is project where there is that script, else lab"`
	Nodes       int    `json:"nodes,omitempty" jsonschema:"how many lab nodes; the default is 3"`
	sessionInput
}

func (d *Server) addEnvironment(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: environmentTool, Title: "The environment of tests", Toolset: setTest, Effect: mcp.Destroys, OpenWorld: true,
		Description: "Makes, resets, shows and destroys the machines that tests run on: those of the project's own " + script + ", or throw-away lab nodes on this machine. " +
			"Each begins a session; get_output tells how it goes. Sessions, and lab nodes with them, end with this server.",
	}, func(ctx context.Context, _ *mcp.Call, in environmentInput) (*mcp.Answer[sessionRow], error) {
		if a, ok, err := d.sessionOperation(ctx, environmentTool, in.Operation, in.sessionInput); ok {
			if err == nil && (in.Environment != "" || in.Nodes != 0) {
				err = fmt.Errorf("%s takes neither environment nor nodes", in.Operation)
			}
			return a, err
		}
		argv, err := d.environment(in)
		if err != nil {
			return nil, err
		}
		return d.started(session.Order{Tool: environmentTool, Operation: in.Operation, Dir: d.Dir, Argv: argv})
	})
}

// environment is the command of an operation.
func (d *Server) environment(in environmentInput) ([]string, error) {
	lab := d.labProgram()
	own, err := d.script(map[string]string{"create": "create", "reset": "reset", "status": "status", "teardown": "destroy", "destroy": "destroy"}[in.Operation])
	if in.Environment == "" {
		if in.Environment = "project"; errors.Is(err, errNoScript) && lab != "" {
			in.Environment = "lab"
		}
	}
	if in.Environment == "project" {
		if in.Nodes != 0 {
			return nil, errors.New("nodes is for the lab; how many machines the project's own environment has is its script's to say")
		}
		if errors.Is(err, errNoScript) {
			return nil, fmt.Errorf("the project has no %s, and the lab's program %s is not installed; put either there, or start the server with --lab FILE", script, labCommand)
		}
		return own, err
	}
	if lab == "" {
		return nil, fmt.Errorf("the lab's program %s is not on PATH; start the server with --lab FILE, or use the environment project", labCommand)
	}
	if in.Nodes == 0 {
		in.Nodes = 3
	}
	if in.Nodes < 1 || in.Nodes > maxLabNodes {
		return nil, fmt.Errorf("nodes: a lab has 1 to %d", maxLabNodes)
	}
	argv := []string{lab, "--name", d.labName()}
	switch in.Operation {
	case "create":
		return append(argv, "up", strconv.Itoa(in.Nodes)), nil
	case "reset":
		return append(argv, "renew", strconv.Itoa(in.Nodes)), nil
	case "status":
		return append(argv, "list"), nil
	}
	return append(argv, "down"), nil
}

// labProgram is the program that boots lab nodes; "" is none.
func (d *Server) labProgram() string {
	if d.Lab != "" {
		return d.Lab
	}
	file, err := exec.LookPath(labCommand)
	if err != nil || !filepath.IsAbs(file) {
		return ""
	}
	return file
}

// labName is that of the project's lab on this machine.
func (d *Server) labName() string {
	sum := sha256.Sum256([]byte(d.Dir))
	return "dev-" + hex.EncodeToString(sum[:5])
}

// labIsUp tells whether the project's lab has nodes that run.
func (d *Server) labIsUp(ctx context.Context) bool {
	lab := d.labProgram()
	if lab == "" || !slices.ContainsFunc(d.sessions.List(), func(s *session.Session) bool {
		return s.Order.Tool == environmentTool && s.Order.Argv[0] == lab
	}) {
		return false // nobody made one through us
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	list := exec.CommandContext(ctx, lab, "list")
	list.WaitDelay = time.Second // for what holds its output and goes on
	out, err := list.Output()
	if err != nil {
		return false
	}
	for line := range bytes.Lines(out) {
		if f := bytes.Fields(line); len(f) == 4 && string(f[0]) == d.labName() && string(f[3]) == "running" {
			return true
		}
	}
	return false
}
