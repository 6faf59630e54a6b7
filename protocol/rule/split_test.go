package rule

import (
	"errors"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestSplit(t *testing.T) {
	for text, want := range map[string][]string{
		`a`:                    {"a"},
		"  a\tb  c ":           {"a", "b", "c"},
		`a 'b c' "d e"`:        {"a", "b c", "d e"},
		`a'b'"c"d`:             {"abcd"},
		`'' ""`:                {"", ""},
		`a '\' "\\" \\ "\a"`:   {"a", `\`, `\`, `\`, `\a`},
		`a\ b \' \" \$ \;`:     {"a b", "'", `"`, "$", ";"},
		`"\$ \" \` + "`" + `"`: {"$ \" `"},
		"a \\\n b\\\nc":        {"a", "bc"},
		"\"a\\\nb\"":           {"ab"},
		"'a\nb'":               {"a\nb"},
		`';|&<>()$*?[]{}~#!'`:  {`;|&<>()$*?[]{}~#!`},
		`";|&<>()*?[]{}~#!"`:   {`;|&<>()*?[]{}~#!`},
		`a a#b a~ a=b HEAD~1`:  {"a", "a#b", "a~", "a=b", "HEAD~1"},
		`a ! -name x !`:        {"a", "!", "-name", "x", "!"},
		`'A'=b`:                {"A=b"},
		`1=b`:                  {"1=b"},
		`\~ \# é`:              {"~", "#", "é"},
		`a ]`:                  {"a", "]"},
	} {
		if got, err := Split(text); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v", text, got, err)
		}
	}
}

func TestSplitRefuses(t *testing.T) {
	for _, c := range []struct {
		text string
		char rune
		at   int
	}{
		{`a;b`, ';', 2}, {"a\nb", '\n', 2}, {`a | b`, '|', 3}, {`a & b`, '&', 3}, {`a <b`, '<', 3}, {`a >b`, '>', 3}, {`(a)`, '(', 1}, {`a)`, ')', 2},
		{`é $b`, '$', 3}, {`a "$b"`, '$', 4}, {"a `b`", '`', 3}, {"a \"`b`\"", '`', 4}, {`a {b,c}`, '{', 3}, {`a }`, '}', 3}, {`a *`, '*', 3}, {`a b?`, '?', 4}, {`a [b]`, '[', 3},
		{`a #b`, '#', 3}, {`a ~`, '~', 3}, {`a ~root`, '~', 3}, {`a b=~`, '~', 5}, {`a b:~`, '~', 5}, {`! a`, '!', 1}, {`!`, '!', 1}, {`A=b a`, '=', 2}, {`A1_=`, '=', 4}, {`A+=b`, '=', 3},
		{`''; a`, ';', 3}, {`a\\;`, ';', 4},
	} {
		var syntax *ShellSyntax
		if words, err := Split(c.text); !errors.As(err, &syntax) || syntax.Char != c.char || syntax.At != c.at || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %q, %v", c.text, words, err)
		}
	}
	for text, says := range map[string]string{
		``: "no command", `  `: "no command", `a 'b`: "character 3 is never closed", `a "b\"`: "character 3 is never closed", `a \`: "has nothing after it",
		"a\x00b": "NUL", "'\x00'": "NUL", "a \xff": "UTF-8", strings.Repeat("a", protocol.MaxArgSize+1): "bytes", strings.Repeat("a ", protocol.MaxArgs+1): "words",
	} {
		var syntax *ShellSyntax
		if _, err := Split(text); err == nil || errors.As(err, &syntax) || !strings.Contains(err.Error(), says) {
			t.Errorf("%.40q: %v", text, err)
		}
	}
}

func TestSplitPipes(t *testing.T) {
	for text, want := range map[string]string{
		`a`: `a`, `a b|c d`: `a b/c d`, `a "|" | b '|'|c`: `a | / b | / c`, `a \| b`: `a | b`,
	} {
		commands, err := SplitPipes(text)
		var got []string
		for _, c := range commands {
			got = append(got, strings.Join(c, " "))
		}
		if err != nil || strings.ReplaceAll(strings.Join(got, "/"), " / ", "/") != strings.ReplaceAll(want, " / ", "/") {
			t.Errorf("%s: %q, %v", text, got, err)
		}
	}
	for text, says := range map[string]string{
		`a || b`: "character 3", `a |& b`: "character 3", `a |`: "beside the |", `| a`: "beside the |", `a | | b`: "beside the |", ``: "no command", `a | b; c`: "character 6",
		`a | A=b c`: "character 6", `a | ! b`: "character 5", `a > b | c`: "character 3", `a | "`: "never closed",
	} {
		if got, err := SplitPipes(text); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %q, %v", text, got, err)
		}
	}
}

// TestSplitLikeAShell holds Split against a real shell: what Split takes, the shell takes for the same words.
func TestSplitLikeAShell(t *testing.T) {
	const seed, tries = 7, 4000
	random := rand.New(rand.NewPCG(seed, seed))
	pieces := append(strings.Split("a b ' ' ' \" \" \\ $ ` ~ # ! = A= * ? [ ] { } , .. ; | & < > ( ) - é : ^ % @ +", " "), " ", " ", " ", "\t", "\n")
	var texts []string
	for range tries {
		var text strings.Builder
		for range 1 + random.IntN(12) {
			text.WriteString(pieces[random.IntN(len(pieces))])
		}
		texts = append(texts, text.String())
	}
	for _, shell := range []string{"sh", "bash"} {
		if _, err := exec.LookPath(shell); err != nil {
			t.Errorf("%s is needed: %v", shell, err)
			continue
		}
		var script strings.Builder
		var want []string
		for _, text := range texts {
			words, err := Split(text)
			if err != nil {
				continue
			}
			// Each text follows a program's name, which is what the first word of it is not.
			script.WriteString(`printf '%s\0' x ` + text + "\nprintf '\\1\\0'\n")
			want = append(append(append(want, "x"), words...), "\x01")
		}
		cmd := exec.Command(shell, "-c", script.String())
		cmd.Dir = t.TempDir()
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", shell, err)
		}
		got := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")
		if len(want) < tries/10 {
			t.Errorf("only %d words in all", len(want))
		}
		for i := range want {
			if i >= len(got) || got[i] != want[i] {
				t.Fatalf("%s, word %d: it has %q, and Split %q", shell, i, got[i:min(i+5, len(got))], want[i:min(i+5, len(want))])
			}
		}
	}
}

// again writes words so that they split to the same.
func again(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}

func FuzzSplit(f *testing.F) {
	for _, text := range []string{`a 'b c' "d\"e" f\ g`, `a | b`, "a \\\n b", `!`, `A=b`, `~`, `''`, "a\x00", "\xff", `"$"`, `'a`} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		words, err := Split(text)
		if err == nil {
			if quoted := again(words); len(quoted) <= protocol.MaxArgSize {
				if second, err := Split(quoted); err != nil || !slices.Equal(second, words) {
					t.Fatalf("%q: %q, then %q, %v", text, words, second, err)
				}
			}
		} else if strings.ContainsAny(err.Error(), "\n\x00") {
			t.Fatalf("%q: the error is not one line: %q", text, err)
		}
		commands, err := SplitPipes(text)
		if words != nil && (err != nil || len(commands) != 1 || !slices.Equal(commands[0], words)) {
			t.Fatalf("%q: %q without pipes, %q with, %v", text, words, commands, err)
		}
		for _, c := range commands {
			if len(c) == 0 {
				t.Fatalf("%q: an empty command", text)
			}
		}
	})
}
