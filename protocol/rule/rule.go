// Package rule says which commands a node runs, as data: an allow-list grammar of programs, their subcommands, options and
// operands. What no rule describes is refused. There is no shell anywhere: Split makes words of a text as a shell would,
// and refuses what only a shell could carry out; Match holds the words against the rules, and returns the ones to run,
// written anew from what it understood.
//
// Read on in match.go for how a command is held against a rule, split.go for the words of a text, validate.go for what a
// rule may be, and default.go for the rules that every node has.
package rule

import (
	"os"
	"strings"

	"github.com/nix-infra/nix-infra/protocol"
)

// Rule allows the use of one program, in the forms that it names. A node's policy file has rules in this JSON form.
type Rule struct {
	Name    string        `json:"name"`           // for people; refusals and the record name it
	Program string        `json:"program"`        // a bare name, which the node looks up among its system's programs, or an absolute path
	Role    protocol.Role `json:"role,omitempty"` // the least that is needed
	Style   Style         `json:"style,omitempty"`

	Forms   []Form   `json:"forms,omitempty"`   // one of them must fit; none: no words and no operands
	Options []Option `json:"options,omitempty"` // of all forms
	Denied  []Denied `json:"denied,omitempty"`  // options and words, with why: never taken, and refused with the reason

	// Defaults are options that are put in front where a command does not have them itself. They are among Options,
	// without a value or as --name=value or -nVALUE.
	Defaults []string `json:"defaults,omitempty"`

	Env     []Variable `json:"env,omitempty"`     // beyond the few that every command has
	User    string     `json:"user,omitempty"`    // "": nobody, who may nothing; or root, or a user's name
	Groups  []string   `json:"groups,omitempty"`  // more groups of that user
	Timeout int        `json:"timeout,omitempty"` // seconds; 0: DefaultTimeout
	Output  int64      `json:"output,omitempty"`  // bytes of stdout and stderr together; 0: DefaultOutput
}

// Limits of a run where its rule has none.
const (
	DefaultTimeout = 60       // seconds
	DefaultOutput  = 16 << 20 // bytes
)

// Style is how a program reads its options.
type Style string

const (
	GNU   Style = ""      // -a, -abc for -a -b -c, -n5 or -n 5, --long, --long=5 or --long 5
	Words Style = "words" // -name and -name VALUE, each a word of its own, as find and ip have them
)

// Form is a way to call a program: words that must come first, then operands, with options anywhere.
type Form struct {
	Words    []string  `json:"words,omitempty"` // the subcommand, word by word: "list" or alternatives, "show|list"
	Options  []Option  `json:"options,omitempty"`
	Operands []Operand `json:"operands,omitempty"` // in their order; each takes as many as fit
}

// Operand is a kind of operand. None ever begins with "-".
type Operand struct {
	What    string `json:"what"`          // for people, after "expected": "a unit", "a file's path"
	Pattern string `json:"pattern"`       // RE2, of the whole operand
	Not     string `json:"not,omitempty"` // RE2, of the whole operand: those that are refused all the same
	Min     int    `json:"min,omitempty"`
	Max     int    `json:"max,omitempty"` // 0: 1
}

// Option is an option in all its spellings. It is taken only as it is spelled here: a long one is never abbreviated.
type Option struct {
	Names    []string `json:"names"`              // "-n", "--lines"
	Value    string   `json:"value,omitempty"`    // RE2, of the whole value; "": it has none
	Not      string   `json:"not,omitempty"`      // RE2, of the whole value: those that are refused all the same
	Optional bool     `json:"optional,omitempty"` // the value may be left out, and is never a word of its own
	Loose    bool     `json:"loose,omitempty"`    // an optional value is the next word, too, where that fits: journalctl -b -1
	Many     bool     `json:"many,omitempty"`     // may be given more than once
}

// Denied names options and subcommand words that are known, and why there is no way to have them.
type Denied struct {
	Names []string `json:"names"`
	Why   string   `json:"why"` // "it runs other programs"
}

// Variable is an environment variable.
type Variable struct {
	Name     string `json:"name"`
	Value    string `json:"value"`               // {node} in it is the node's name
	IfExists bool   `json:"if_exists,omitempty"` // set only where Value is the path of something that exists
}

// Allowed is a command that may run.
type Allowed struct {
	Rule Rule
	Argv []string // what to run; Argv[0] is the rule's program
}

// Environ returns the rule's variables as NAME=value, on the node of that name.
func (r *Rule) Environ(node string) []string {
	var environ []string
	for _, v := range r.Env {
		value := strings.ReplaceAll(v.Value, "{node}", node)
		if v.IfExists {
			if _, err := os.Stat(value); err != nil {
				continue
			}
		}
		environ = append(environ, v.Name+"="+value)
	}
	return environ
}

// Limits returns how long a run may take, in seconds, and how much it may print, in bytes.
func (r *Rule) Limits() (timeout int, output int64) {
	timeout, output = r.Timeout, r.Output
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	if output == 0 {
		output = DefaultOutput
	}
	return timeout, output
}
