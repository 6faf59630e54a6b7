package dev

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/mcp/session"
)

const (
	testTool = "test-runner"
	testsDir = "__test__"
	script   = testsDir + "/run-tests.sh"
)

type testInput struct {
	Operation string `json:"operation" enum:"run,reset,get_output,list_sessions,cancel" jsonschema:"run or reset a test (which begins a session), or look after a session: get_output, list_sessions, cancel (which ends all its processes)"`
	TestName  string `json:"test-name,omitempty" max:"128" jsonschema:"a folder in __test__; for run and reset"`
	sessionInput
}

func (d *Server) addTests(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: testTool, Title: "Run the project's tests", Toolset: setTest, Effect: mcp.Destroys, OpenWorld: true,
		Description: "Runs tests of the project by its own " + script + ", as sessions that go on while you do something else: run gives a session_id, get_output what it said so far and its exit code. " +
			"Where test-environment has made lab nodes, the script runs in the lab's network. Sessions end with this server.",
	}, func(ctx context.Context, _ *mcp.Call, in testInput) (*mcp.Answer[sessionRow], error) {
		if a, ok, err := d.sessionOperation(ctx, testTool, in.Operation, in.sessionInput); ok {
			if err == nil && in.TestName != "" {
				err = fmt.Errorf("%s takes no test-name", in.Operation)
			}
			return a, err
		}
		if _, err := d.testDir(in.TestName); err != nil {
			return nil, err
		}
		argv, err := d.script(in.Operation, in.TestName)
		if err != nil {
			return nil, err
		}
		if d.labIsUp(ctx) {
			argv = append([]string{d.labProgram(), "--name", d.labName(), "run", "--"}, argv...)
		}
		return d.started(session.Order{Tool: testTool, Operation: in.Operation, Subject: in.TestName, Dir: d.Dir, Argv: argv})
	})
}

var testName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]*$`)

// testDir is the folder of a test, below the project. It is an argument of the script's, too, and so no option of it.
func (d *Server) testDir(name string) (string, error) {
	switch {
	case name == "":
		return "", errors.New("which test? Give test-name, the name of a folder in " + testsDir)
	case !testName.MatchString(name) || strings.Contains(name, ".."):
		return "", fmt.Errorf("%+.128q is no test's name; expected letters, digits, - and _", name)
	}
	info, err := os.Lstat(filepath.Join(d.Dir, testsDir, name)) // no link
	if err != nil || !info.IsDir() {
		return "", fmt.Errorf("there is no test %s: %s/%s is no folder", name, testsDir, name)
	}
	return testsDir + "/" + name, nil
}

// script is the command that runs the project's own script with arguments.
func (d *Server) script(args ...string) ([]string, error) {
	file := filepath.Join(d.Dir, script)
	for _, name := range []string{filepath.Dir(file), file} {
		info, err := os.Lstat(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("%w: the project has no %s, which runs its tests", errNoScript, script)
		case err != nil:
			return nil, err
		case info.Mode()&fs.ModeSymlink != 0:
			return nil, fmt.Errorf("%s is, or lies behind, a link; put the script itself there", script)
		case name == file && !info.Mode().IsRegular():
			return nil, fmt.Errorf("%s is no file", script)
		case name == file && info.Mode()&0o111 == 0:
			return append([]string{"bash", file}, args...), nil // a checkout may have lost its permissions
		}
	}
	return append([]string{file}, args...), nil
}

var errNoScript = errors.New("no script")
