// Package nixosmodule has the NixOS modules of this folder, for the CLI to put into the trees of nodes.
package nixosmodule

import (
	"embed"
	"fmt"
)

//go:embed *.nix
var files embed.FS

// elsewhere are what only our own flake uses: they refer to the rest of the source tree.
var elsewhere = map[string]bool{"package.nix": true, "test.nix": true}

// Injected are the files of nix-infra/ in a node's tree, by their path there. The CLI adds settings.json, {"closeSSH":
// bool}, and the node facts.json (protocol.NodeFacts).
var Injected = injected()

func injected() map[string][]byte {
	entries, err := files.ReadDir(".")
	if err != nil {
		panic(fmt.Sprintf("what is embedded can't be read: %v", err))
	}
	all := map[string][]byte{}
	for _, e := range entries {
		data, err := files.ReadFile(e.Name())
		if err != nil {
			panic(fmt.Sprintf("what is embedded can't be read: %v", err))
		}
		switch name := e.Name(); {
		case elsewhere[name]:
		case name == "injected.nix":
			all["default.nix"] = data
		default:
			all["module/"+name] = data
		}
	}
	return all
}
