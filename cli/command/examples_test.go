package command

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nix-infra/nix-infra/examples"
)

// callOf is where a text has a call of this program: where a command begins in a shell, or after what runs one.
var callOf = regexp.MustCompile(`(?m)(?:^ *(?:[A-Z_]+=\S+ )*|[|&;('"]\s*|xargs |sudo )nix-infra( |$)`)

// calls are the words of each call of this program in a text of shell.
func calls(text string) (all [][]string) {
	for _, at := range callOf.FindAllStringIndex(text, -1) {
		all = append(all, shellWords(text[at[1]:]))
	}
	return all
}

// shellWords are the words of a text up to the end of its first command, as far as examples need it: what a shell would put in the
// place of a variable or of $(…) stays as it is.
func shellWords(text string) (words []string) {
	word, begun, quote, before := "", false, rune(0), ' '
	for _, c := range text + "\n" {
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
			word += string(c)
		case c == '\'' || c == '"':
			quote, begun = c, true
		case strings.ContainsRune(" \n|;&<>)", c) || c == '#' && before == ' ':
			if begun {
				words = append(words, word)
			}
			if word, begun = "", false; c != ' ' {
				return words
			}
		default:
			word, begun = word+string(c), true
		}
		before = c
	}
	return words
}

func TestShellWords(t *testing.T) {
	text := "A=1 nix-infra x --a 'b c' | nix-infra y \"d $(nix-infra z q)\" # nix-infra no\nnix-infra\n  ssh w nix-infra-agent x\necho a nix-infra b\n"
	want := []string{"x,--a,b c", "y,d $(nix-infra z q)", "z,q", ""}
	var got []string
	for _, words := range calls(text) {
		got = append(got, strings.Join(words, ","))
	}
	if strings.Join(got, ";") != strings.Join(want, ";") {
		t.Errorf("%q, want %q", got, want)
	}
}

// understood tells whether there is such a command, whether it has these flags and, where the call is whole, whether it takes what
// stands alone.
func understood(words []string, whole bool) error {
	root := (&app{}).root()
	words = joinBatch(root, words)
	c, rest, err := root.Find(words)
	if err == nil {
		err = c.ParseFlags(rest)
	}
	if err == nil && (whole || c.HasSubCommands()) && !c.DisableFlagParsing {
		err = c.ValidateArgs(c.Flags().Args())
	}
	var half *pflag.ValueRequiredError
	if !whole && (errors.Is(err, pflag.ErrHelp) || errors.As(err, &half)) {
		return nil
	}
	return err
}

// Each example in the help is a call that the program understands.
func TestHelpExamples(t *testing.T) {
	var each func(c *cobra.Command)
	each = func(c *cobra.Command) {
		for line := range strings.Lines(c.Example) {
			found := calls(line)
			if len(found) == 0 && c.Name() != "tunnel" { // which ssh runs
				t.Errorf("%s: an example without a call: %s", c.CommandPath(), line)
			}
			for _, words := range found {
				if err := understood(words, true); err != nil {
					t.Errorf("%s: %s%v", c.CommandPath(), line, err)
				}
			}
		}
		for _, sub := range c.Commands() {
			each(sub)
		}
	}
	each((&app{}).root())
}

// Each call in the documents is one that the program understands. What stands in a sentence need not be whole.
func TestDocumentedCalls(t *testing.T) {
	texts := map[string]string{}
	for _, pattern := range []string{"README.md", "docs/*.md", "examples/README.md"} {
		found, _ := filepath.Glob(filepath.Join("..", "..", pattern))
		for _, path := range found {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			texts[path] = string(data)
		}
	}
	for _, template := range examples.Names {
		files, err := examples.Files(template)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if strings.HasSuffix(f.Path, ".md") {
				texts[template+"/"+f.Path] = string(f.Data)
			}
		}
	}
	inSentence := regexp.MustCompile("`(nix-infra [^`]+)`")
	count := 0
	for path, text := range texts {
		fenced := false
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, "```") {
				fenced = !fenced
			}
			if !fenced && !strings.HasPrefix(line, "    ") || strings.Contains(line, "──") { // a drawing
				continue
			}
			for _, words := range calls(line) {
				count++
				if err := understood(words, true); err != nil {
					t.Errorf("%s: %s%v", path, line, err)
				}
			}
		}
		for _, m := range inSentence.FindAllStringSubmatch(text, -1) {
			for _, words := range calls(strings.Join(strings.Fields(strings.ReplaceAll(m[1], `\|`, "|")), " ")) {
				count++
				if err := understood(words, false); err != nil {
					t.Errorf("%s: %s: %v", path, m[1], err)
				}
			}
		}
	}
	if count < 100 {
		t.Errorf("only %d calls were found in %d documents", count, len(texts))
	}
}
