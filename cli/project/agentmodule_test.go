package project

import (
	"bytes"
	"strings"
	"testing"

	nixosmodule "github.com/nix-infra/nix-infra/nixos-module"
)

const (
	nixos = "{ outputs = { nixpkgs, ... }: { x = nixpkgs.lib.nixosSystem { modules = [ ./configuration.nix ]; }; }; }\n"
	slots = "{ lib, ... }: { imports = map lib.fileset.maybeMissing [ ./cluster_node.nix ./control_node.nix ]; }\n"
)

// The agent gets into each node's system, once, and never in the way of a project that has it already.
func TestAgentModule(t *testing.T) {
	node := "nodes: { n1: { ipv4: 192.0.2.1 }, n2: { } }\n"
	for name, c := range map[string]struct {
		files   map[string]string
		request TreeRequest
		want    map[string]string // files of the tree, or a part of one; "" is one that is not there
		warns   string
	}{
		"wraps the node type": {
			map[string]string{"configuration.nix": slots, "node_types/web.nix": "web"}, TreeRequest{NodeModule: "web"},
			map[string]string{"cluster_node.nix": "{ imports = [ ./node_type.nix ./nix-infra ]; }", "node_type.nix": "web", "control_type.nix": "", "nix-infra/default.nix": "./facts.json"}, ""},
		"wraps both": {
			map[string]string{"configuration.nix": slots, "node_types/web.nix": "web", "node_types/control_node.nix": "control"},
			TreeRequest{NodeModule: "web", Control: true},
			map[string]string{"cluster_node.nix": "./node_type.nix ./nix-infra", "node_type.nix": "web", "control_node.nix": "./control_type.nix ./nix-infra", "control_type.nix": "control"}, ""},
		"makes the slot that is named": {
			map[string]string{"configuration.nix": slots}, TreeRequest{},
			map[string]string{"cluster_node.nix": "{ imports = [ ./nix-infra ]; }", "node_type.nix": "", "control_node.nix": ""}, ""},
		"imported by the project": {
			map[string]string{"configuration.nix": "{ imports = [ ./nix-infra ./cluster_node.nix ]; }\n", "node_types/web.nix": "web"}, TreeRequest{NodeModule: "web"},
			map[string]string{"cluster_node.nix": "web", "node_type.nix": "", "nix-infra/module/agent.nix": "services.nix-infra-agent"}, ""},
		"imported in a comment only": {
			map[string]string{"configuration.nix": "# ./nix-infra\n{ imports = [ ./cluster_node.nix ]; }\n"}, TreeRequest{},
			map[string]string{"cluster_node.nix": "./nix-infra"}, ""},
		"no way in": {
			map[string]string{"node_types/web.nix": "web"}, TreeRequest{NodeModule: "web"},
			map[string]string{"cluster_node.nix": "web", "nix-infra/default.nix": ""}, "the agent lasts until the next boot"},
		"a flake's input": {
			map[string]string{"configuration.nix": slots, "flake.nix": nixos + "# modules = [ inputs.nix-infra.nixosModules.default ]\n"}, TreeRequest{},
			map[string]string{"nix-infra/default.nix": "./module"}, ""},
		"a flake's input that counts": {
			map[string]string{"configuration.nix": slots, "flake.nix": strings.Replace(nixos, "./configuration.nix", "./configuration.nix inputs.nix-infra.nixosModules.default", 1)}, TreeRequest{},
			map[string]string{"cluster_node.nix": "", "nix-infra/default.nix": ""}, ""},
		"a copy of the module": {
			map[string]string{"configuration.nix": slots, "modules/agent.nix": "{ options.services.nix-infra-agent = { }; }"}, TreeRequest{},
			map[string]string{"cluster_node.nix": "", "nix-infra/default.nix": ""}, ""},
		"its own, it says": {
			map[string]string{"configuration.nix": slots, SettingsFile: "fleet: f\nagent: { module: own }\n" + node}, TreeRequest{},
			map[string]string{"cluster_node.nix": "", "nix-infra/default.nix": ""}, ""},
		"not made of NixOS's modules": {
			map[string]string{"configuration.nix": slots, "flake.nix": "{ }\n"}, TreeRequest{},
			map[string]string{"cluster_node.nix": "", "nix-infra/default.nix": ""}, ""},
		"not made of them, it is told": {
			map[string]string{"configuration.nix": slots, "flake.nix": "{ }\n", SettingsFile: "fleet: f\nagent: { module: inject }\n" + node}, TreeRequest{},
			map[string]string{"cluster_node.nix": "./nix-infra"}, ""},
		"closed SSH": {
			map[string]string{"configuration.nix": slots, SettingsFile: "fleet: f\ndefaults: { close_ssh: true }\n" + node}, TreeRequest{},
			map[string]string{"nix-infra/settings.json": `{"v":1,"closeSSH":true}` + "\n"}, ""},
		"open all the same": {
			map[string]string{"configuration.nix": slots, SettingsFile: "fleet: f\ndefaults: { close_ssh: true }\nnodes: { n1: { close_ssh: false } }\n"}, TreeRequest{},
			map[string]string{"nix-infra/settings.json": `{"v":1,"closeSSH":false}` + "\n"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if c.files["flake.nix"] == "" {
				c.files["flake.nix"] = nixos
			}
			c.request.Node = "n1"
			tree, err := small(t, c.files).Tree(c.request)
			if err != nil {
				t.Fatal(err)
			}
			validManifest(t, "n1", tree)
			got := map[string]string{}
			for _, f := range tree.Files {
				got[f.Path] = string(f.Data)
			}
			for path, part := range c.want {
				if part == "" && got[path] != "" || !strings.Contains(got[path], part) {
					t.Errorf("%s is %q, not %q", path, got[path], part)
				}
			}
			if warnings := strings.Join(tree.Warnings, "\n"); c.warns == "" && warnings != "" || !strings.Contains(warnings, c.warns) {
				t.Errorf("warnings %q", warnings)
			}
			if _, there := got["nix-infra/default.nix"]; !there {
				return
			}
			for name, data := range nixosmodule.Injected {
				if !bytes.Equal(data, []byte(got["nix-infra/"+name])) {
					t.Errorf("nix-infra/%s is not the module's", name)
				}
			}
		})
	}
	_, err := small(t, map[string]string{"flake.nix": nixos, SettingsFile: "fleet: f\nagent: { module: inject }\n" + node}).Tree(TreeRequest{Node: "n1"})
	if err == nil || !strings.Contains(err.Error(), "import ./nix-infra there") {
		t.Errorf("no way in, and it has to be: %v", err)
	}
}

// What is embedded is whole: a module that imports a file has it.
func TestModuleIsWhole(t *testing.T) {
	for _, name := range []string{"default.nix", "module/default.nix", "module/agent.nix", "module/controller.nix", "module/secrets.nix", "module/policy.nix", "module/health.nix", "module/types.nix"} {
		if len(nixosmodule.Injected[name]) == 0 {
			t.Errorf("%s is missing", name)
		}
	}
	for name := range nixosmodule.Injected {
		if strings.Contains(name, "package") || strings.Contains(name, "test") {
			t.Errorf("%s refers to the source tree, which is not there", name)
		}
	}
}
