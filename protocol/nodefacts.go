package protocol

// ModuleFile is in a tree that brings the agent's NixOS module along. For such a tree, the node's agent makes FactsFile: it is
// the node's own, as NodeFiles are, and no manifest may carry it.
const (
	ModuleFile = "nix-infra/default.nix"
	FactsFile  = "nix-infra/facts.json"
)

// NodeFacts is FactsFile: what a node's configuration has to know of its machine.
type NodeFacts struct {
	Version    int            `json:"v"`
	Node       string         `json:"node"`
	System     string         `json:"system"` // in Nix's words, such as x86_64-linux
	Agent      *StoredProgram `json:"agent,omitempty"`
	Controller *StoredProgram `json:"controller,omitempty"` // where the machine is a controller, too
}

// StoredProgram is a program of ours in a node's Nix store: a folder with bin/NAME. A fixed-output derivation of this name
// and hash has the same store path, so that a configuration can name the program without fetching or building it.
type StoredProgram struct {
	Name string `json:"name"`
	Hash string `json:"hash"` // of the folder as a NAR, in Nix's words: sha256:…
	// Settings tells that the machine has a file of settings for it, which was there before the configuration.
	Settings bool `json:"settings,omitempty"`
}
