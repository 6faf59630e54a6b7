package command

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// infectDir, beside fleet.json, has the conversion scripts.
const infectDir = "infect"

// conversion is how machines become NixOS machines. That a script or program is missing is found out here, and matters where
// a machine needs it.
func (a *app) conversion(p *project.Project, o *provisionOptions) (provision.Conversion, error) {
	c := provision.Conversion{Method: project.Method(o.method)}
	if o.mutation != "" && o.infectScript != "" {
		return c, errors.New("--mutation and --infect-script are two scripts; give one")
	}
	if (o.mutation != "" || o.infectScript != "") && c.Method != project.MethodInfect {
		return c, fmt.Errorf("--mutation and --infect-script go with --method infect, not with %s", c.Method)
	}
	switch {
	case c.Method == project.MethodAnywhere:
		program, err := exec.LookPath(provision.AnywhereProgram)
		if err != nil {
			c.Missing = errors.New("there is no nixos-anywhere on this machine; install it, or use --method infect")
		}
		c.Anywhere = func(ctx context.Context, t provision.Target, node string) ([]string, error) {
			return a.anywhere(ctx, p, o, program, t, node)
		}
	case c.Method == project.MethodInfect && o.mutation != "":
		c.Mutation = true
		if !filepath.IsLocal(o.mutation) || filepath.Base(o.mutation) != o.mutation {
			return c, fmt.Errorf("--mutation %q: expected the name of a file in %s", o.mutation, a.own(infectDir))
		}
		script, err := a.script(a.own(infectDir, o.mutation), "")
		if err != nil {
			return c, fmt.Errorf("--mutation %s: %w", o.mutation, err)
		}
		c.Script = script
	case c.Method == project.MethodInfect:
		var err error
		if c.Script, err = a.infectScript(p, o.infectScript); err != nil && o.infectScript != "" {
			return c, fmt.Errorf("--infect-script: %w", err)
		}
		c.Missing = err
	}
	return c, nil
}

// infectScript reads the conversion script: the project's, which has to be the pinned one, or another that was given.
func (a *app) infectScript(p *project.Project, given string) ([]byte, error) {
	pinned := p.Settings.Provision.Infect
	if given != "" {
		want := pinned.SHA256
		if pinned.Commit == project.DefaultInfect.Commit {
			want = "" // what that commit has is known: this is another one
		}
		return a.script(given, want)
	}
	script, err := provision.ReadScript(a.own(infectDir, provision.InfectFile), pinned.Pinned().SHA256)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no conversion script in %s: bring it by nix-infra init --fetch, or give one by --infect-script", a.own(infectDir))
	}
	return script, err
}

// script reads a script and says which it is.
func (a *app) script(file, want string) ([]byte, error) {
	script, err := provision.ReadScript(file, want)
	if err == nil {
		a.note("conversion script %s: SHA-256 %s", file, provision.ScriptHash(script))
	}
	return script, err
}

// anywhere has nixos-anywhere install a node's tree.
func (a *app) anywhere(ctx context.Context, p *project.Project, o *provisionOptions, program string, t provision.Target, node string) ([]string, error) {
	composer := a.newTrees(p, treeFlags{nixosVersion: o.nixosVersion, nodeModule: o.nodeModule}, nil)
	composer.known = []project.NodeFacts{{Name: node, IPv4: ipv4Of(t.Host)}}
	tree, err := composer.of(node)
	if err != nil {
		return nil, err
	}
	root, err := os.MkdirTemp("", "nix-infra-tree-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(root)
	for _, f := range tree.Files {
		path := filepath.Join(root, "etc/nixos", filepath.FromSlash(f.Path))
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, f.Data, f.Mode)); err != nil {
			return nil, err
		}
	}
	return provision.Anywhere(ctx, program, root, a.own(journalDir, node+".log"), t, node)
}

// ipv4Of is a host that is an IPv4 address, else "".
func ipv4Of(host string) string {
	if ip := net.ParseIP(host); ip != nil && ip.To4() != nil {
		return host
	}
	return ""
}

// waysTo are the ways into a server: as its provider or the settings have it, and as root, who is the only one after a
// conversion.
func (a *app) waysTo(s provision.Server, sshKey string, p *project.Project) ([]provision.Target, error) {
	address := project.SSHAddress{User: s.User, Host: s.Host}
	if own := p.Settings.Nodes[s.Name].SSH; own != "" {
		given, err := project.ParseSSHAddress(own)
		if err != nil {
			return nil, err
		}
		given.User = first(given.User, s.User)
		address = given
	}
	t := provision.TargetOf(address)
	t.Node, t.KnownHosts, t.AgentSocket = s.Name, a.own(knownHostsFile), a.Getenv("SSH_AUTH_SOCK")
	t.KeyFiles = a.sshKeys(sshKey, p)
	if sshKey == "" && s.KeyFile != "" {
		t.KeyFiles = []string{s.KeyFile}
	}
	if jump := p.Settings.Provision.Jump; jump != "" {
		jumps, err := project.ParseJump(jump)
		if err != nil {
			return nil, err
		}
		t = t.Through(jumps)
	}
	ways := []provision.Target{t}
	if t.User != "root" {
		t.User = "root"
		ways = append(ways, t)
	}
	return ways, nil
}

// fetchInfect brings the pinned conversion script into the project.
func (a *app) fetchInfect(ctx context.Context, p *project.Project) error {
	file, pinned := a.own(infectDir, provision.InfectFile), p.Settings.Provision.Infect.Pinned()
	if _, err := provision.ReadScript(file, pinned.SHA256); err == nil {
		a.told("conversion script", file, true)
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w; remove it to have the pinned one fetched", err)
	}
	script, err := provision.FetchInfect(ctx, provision.InfectSource, pinned)
	if err != nil {
		return fmt.Errorf("%w; or have it fetched on another machine, and put it there as %s", err, file)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	if err := atomicfile.Write(file, script, 0o644); err != nil {
		return err
	}
	a.told("conversion script", file, false)
	return nil
}
