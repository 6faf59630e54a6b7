package rule

import (
	"slices"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestValidate(t *testing.T) {
	for _, r := range tool() {
		if err := r.Validate(); err != nil {
			t.Errorf("%s: %v", r.Name, err)
		}
	}
	for _, c := range []struct {
		says   string
		damage func(*Rule)
	}{
		{"name:", func(r *Rule) { r.Name = "" }},
		{"name:", func(r *Rule) { r.Name = "a\nb" }},
		{"program", func(r *Rule) { r.Program = "" }},
		{"program", func(r *Rule) { r.Program = "bin/tool" }},
		{"program", func(r *Rule) { r.Program = "/bin/../tool" }},
		{"program", func(r *Rule) { r.Program = "-tool" }},
		{"role", func(r *Rule) { r.Role = "" }},
		{"role", func(r *Rule) { r.Role = protocol.Node }},
		{"style", func(r *Rule) { r.Style = "dos" }},
		{"user", func(r *Rule) { r.User = "a b" }},
		{"group", func(r *Rule) { r.Groups = []string{"-x"} }},
		{"timeout", func(r *Rule) { r.Timeout = -1 }},
		{"timeout", func(r *Rule) { r.Timeout = protocol.MaxRunTime + 1 }},
		{"output", func(r *Rule) { r.Output = maxOutput + 1 }},
		{"too many", func(r *Rule) { r.Forms = make([]Form, maxForms+1) }},
		{"options", func(r *Rule) { r.Options = make([]Option, maxOptions+1) }},
		{"names", func(r *Rule) { r.Options[0].Names = nil }},
		{"expected -a or --name", func(r *Rule) { r.Options[0].Names = []string{"-name"} }},
		{"expected -a or --name", func(r *Rule) { r.Options[0].Names = []string{"--na=me"} }},
		{"expected -a or --name", func(r *Rule) { r.Options[0].Names = []string{"--"} }},
		{"there twice", func(r *Rule) { r.Options = append(r.Options, Option{Names: []string{"-v"}}) }},
		{"there twice", func(r *Rule) { r.Forms[0].Options = []Option{{Names: []string{"-v"}}} }},
		{"denied, too", func(r *Rule) { r.Options = append(r.Options, Option{Names: []string{"--exec"}}) }},
		{"need a value", func(r *Rule) { r.Options[0].Optional = true }},
		{"need a value", func(r *Rule) { r.Options[0].Not = "a" }},
		{"needs \"optional\"", func(r *Rule) { r.Options = append(r.Options, Option{Names: []string{"-z"}, Value: "a", Loose: true}) }},
		{"pattern", func(r *Rule) { r.Options = append(r.Options, Option{Names: []string{"-z"}, Value: "a)|(b"}) }},
		{"pattern", func(r *Rule) {
			r.Options = append(r.Options, Option{Names: []string{"-z"}, Value: strings.Repeat("a", maxPattern+1)})
		}},
		{"form 1: word", func(r *Rule) { r.Forms[0].Words = []string{"show|"} }},
		{"form 1: word", func(r *Rule) { r.Forms[0].Words = []string{"-x"} }},
		{"denied, too", func(r *Rule) { r.Forms[0].Words = []string{"show|drop"} }},
		{"form 1: 9 words", func(r *Rule) { r.Forms[0].Words = slices.Repeat([]string{"a"}, maxWords+1) }},
		{"what", func(r *Rule) { r.Forms[0].Operands[0].What = "" }},
		{"from 3 to 2", func(r *Rule) { r.Forms[0].Operands[0].Min = 3 }},
		{"from 0 to", func(r *Rule) { r.Forms[0].Operands[0].Max = protocol.MaxArgs + 1 }},
		{"pattern", func(r *Rule) { r.Forms[0].Operands[0].Pattern = "" }},
		{"pattern", func(r *Rule) { r.Forms[0].Operands[0].Not = "(" }},
		{"denied", func(r *Rule) { r.Denied = append(r.Denied, Denied{Names: []string{"-y"}}) }},
		{"default", func(r *Rule) { r.Defaults = []string{"--nothing"} }},
		{"default", func(r *Rule) { r.Defaults = []string{"word"} }},
		{"default", func(r *Rule) { r.Defaults = []string{"-c"} }},
		{"default", func(r *Rule) { r.Defaults = []string{"-va"} }},
		{"default", func(r *Rule) { r.Defaults = []string{"-v", "-"} }},
		{"default", func(r *Rule) { r.Defaults = []string{"-v", ""} }},
		{"env", func(r *Rule) { r.Env = []Variable{{Name: "A=B"}} }},
		{"env", func(r *Rule) { r.Env = []Variable{{Name: "A", Value: "\n"}} }},
		{"if_exists", func(r *Rule) { r.Env = []Variable{{Name: "A", Value: "b", IfExists: true}} }},
	} {
		r := tool()[0]
		c.damage(&r)
		if err := r.Validate(); err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", c.says, err)
		}
	}
	words := tool()[2]
	words.Options = append(words.Options, Option{Names: []string{"--long"}})
	if err := words.Validate(); err == nil {
		t.Error("--long in the style of words")
	}
}
