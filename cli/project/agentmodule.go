package project

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	nixosmodule "github.com/nix-infra/nix-infra/nixos-module"
)

// Who brings the agent's NixOS module into the nodes' configuration.
const (
	ModuleInject = "inject" // the tree gets it as nix-infra/, and imports it
	ModuleOwn    = "own"    // the project has it already
)

// AgentSettings are how the nodes' configuration gets the agent.
type AgentSettings struct {
	Module string `yaml:"module,omitempty"` // ModuleInject or ModuleOwn; "": as the project's files tell
}

func (a AgentSettings) check() error {
	if a.Module != "" && a.Module != ModuleInject && a.Module != ModuleOwn {
		return fmt.Errorf("%q; use %s (the module is put into each node's tree) or %s (the project has it in its modules)", a.Module, ModuleInject, ModuleOwn)
	}
	return nil
}

var (
	comments = regexp.MustCompile(`#[^\n]*`)
	// ownModule is what a project writes that has the module by itself: a flake's input, or a copy.
	ownModule = regexp.MustCompile(`nix-infra"?\.nixosModules\b|\boptions\.services\.nix-infra-agent\b`)
	imported  = regexp.MustCompile(`\./nix-infra(/default\.nix)?(["\s\])};]|$)`)
)

// typeSlots are the files that a base configuration takes node types from, and what those are called beside a wrapper.
var typeSlots = []struct{ slot, behind string }{{"cluster_node.nix", "node_type.nix"}, {"control_node.nix", "control_type.nix"}}

// addAgentModule puts the agent's module into a tree that has not got it, so that the node's agent is a part of its system and
// there after the next boot. A configuration.nix that imports ./nix-infra is left as it is. Otherwise the files that it takes node
// types from become wrappers, which import the node type and the module. Both may: NixOS imports a path once.
func (c *composer) addAgentModule() {
	mode := c.project.Settings.Agent.Module
	if mode == ModuleOwn || mode == "" && !c.wantsModule() {
		return
	}
	base := c.code("configuration.nix")
	if !imported.Match(base) && !c.wrapTypes(base) {
		const problem = "configuration.nix imports neither ./nix-infra nor cluster_node.nix or control_node.nix, one of which would bring the agent into the node's system"
		if mode == ModuleInject {
			c.errs = append(c.errs, errors.New(problem+"; import ./nix-infra there"))
			return
		}
		c.warnings = append(c.warnings, problem+": without it, the agent lasts until the next boot. Import ./nix-infra there, or say agent.module: own in "+SettingsFile+" where the project brings the module")
		return
	}
	for name, data := range nixosmodule.Injected {
		c.files = append(c.files, File{Path: "nix-infra/" + name, Mode: 0o644, Data: data})
	}
	settings, err := json.Marshal(struct {
		Version  int  `json:"v"`
		CloseSSH bool `json:"closeSSH"`
	}{1, *c.project.Settings.Node(c.Node).CloseSSH})
	if err != nil {
		c.errs = append(c.errs, err)
	}
	c.files = append(c.files, File{Path: "nix-infra/settings.json", Mode: 0o644, Data: append(settings, '\n')})
}

// wantsModule tells of a project that says nothing whether it makes systems of NixOS's modules, and does not have ours.
func (c *composer) wantsModule() bool {
	if !bytes.Contains(c.code("flake.nix"), []byte("nixosSystem")) {
		return false
	}
	return !slices.ContainsFunc(c.files, func(f File) bool {
		return strings.HasSuffix(f.Path, ".nix") && bytes.Contains(f.Data, []byte("nix-infra")) && ownModule.Match(withoutComments(f.Data))
	})
}

// wrapTypes makes wrappers of the slots that configuration.nix names, and tells whether there is one.
func (c *composer) wrapTypes(base []byte) bool {
	wrapped := false
	wrap := func(slot, imports string) {
		wrapped = true
		c.files = append(c.files, File{Path: slot, Mode: 0o644, Data: []byte("# Made by nix-infra, to bring its agent along.\n{ imports = [ " + imports + " ]; }\n")})
	}
	for _, t := range typeSlots {
		if i := c.index(t.slot); i >= 0 && bytes.Contains(base, []byte(t.slot)) {
			c.files[i].Path = t.behind
			wrap(t.slot, "./"+t.behind+" ./nix-infra")
		}
	}
	if slot := typeSlots[0].slot; !wrapped && bytes.Contains(base, []byte(slot)) {
		wrap(slot, "./nix-infra")
	}
	return wrapped
}

func (c *composer) index(path string) int {
	return slices.IndexFunc(c.files, func(f File) bool { return f.Path == path })
}

// code is a file of the tree without comments, as far as lines can tell.
func (c *composer) code(path string) []byte {
	if i := c.index(path); i >= 0 {
		return withoutComments(c.files[i].Data)
	}
	return nil
}

func withoutComments(nix []byte) []byte { return comments.ReplaceAll(nix, nil) }
