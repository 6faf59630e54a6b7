//go:build linux

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/e2e/lab"
	"github.com/nix-infra/nix-infra/e2e/testos"
)

// programs are the binaries under test, built once by TestMain.
var programs struct {
	dir   string // nix-infra, nix-infra-agent, nix-infra-controller, as `make build` makes them
	crash string // an agent that kills itself at a step (e2e/crashagent)
	next  string // the agent again, with version "next"
	evil  string // a broker that was broken into (e2e/evilbroker)
	hub   string // a NATS and an etcd for several controllers (e2e/hub)

	project string // a project folder as makeProject makes it, which the fleets start from
}

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if err := lab.Available(); err != nil {
		if os.Getenv("CI") != "" {
			fmt.Fprintln(os.Stderr, "the lab is required in CI, and it can't run here:", err)
			return 1
		}
		fmt.Fprintln(os.Stderr, "LEFT OUT: all tests on real nodes, because", err)
		return 0
	}
	dir, err := os.MkdirTemp("", "nix-infra-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	programs.dir = dir
	programs.crash = filepath.Join(dir, "crashagent")
	programs.next = filepath.Join(dir, "next-agent")
	programs.evil = filepath.Join(dir, "evilbroker")
	programs.hub = filepath.Join(dir, "hub")
	for _, b := range []struct {
		out, version string
		pkgs         []string
	}{
		{dir + "/", "under-test", []string{"cli/nix-infra", "agent/nix-infra-agent", "controller/nix-infra-controller", "e2e/crashagent", "e2e/evilbroker", "e2e/hub"}},
		{programs.next, "next", []string{"agent/nix-infra-agent"}},
	} {
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X github.com/nix-infra/nix-infra/protocol.build="+b.version, "-o", b.out)
		for _, pkg := range b.pkgs {
			cmd.Args = append(cmd.Args, "../"+pkg)
		}
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "can't build %v: %v\n%s", b.pkgs, err, out)
			return 1
		}
	}
	programs.project = filepath.Join(dir, "project")
	if err := makeProject(programs.project); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		if common.fleet == nil {
			return
		}
		if err := common.fleet.down(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}()
	return m.Run()
}

// makeProject has the CLI make a project folder, and its admin's credentials beside it. A password costs a second of work
// by design, which a test that runs a hundred commands doesn't have: it is encrypted again for a thousandth of that.
func makeProject(project string, flags ...string) error {
	if err := testos.WriteProject(project); err != nil {
		return err
	}
	return initProject(project, flags...)
}

// initProject is makeProject for a folder that has whatever it has.
func initProject(project string, flags ...string) error {
	cmd := exec.Command(filepath.Join(programs.dir, "nix-infra"), append([]string{"-d", project, "init", "--fleet", "lab", "--nixos-version", testos.DefaultVersion, "--batch"}, flags...)...)
	cmd.Env = append(os.Environ(), "SECRETS_PASS="+password, "HOME="+project)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nix-infra init: %w\n%s", err, out)
	}
	keys := openVault(project)
	if _, err := keys.Rekey(func() (string, error) { return password, nil }); err != nil {
		return err
	}
	creds, err := keys.Get("admin")
	if err != nil {
		return err
	}
	return os.WriteFile(project+".creds", creds, 0o600)
}

// openVault is the vault with a project's keys.
func openVault(project string) *vault.Vault {
	return vault.New(filepath.Join(project, "nix-infra", "keys"), func() (string, error) { return password, nil }, vault.WorkFactor(7))
}
