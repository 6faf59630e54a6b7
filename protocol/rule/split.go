package rule

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/nix-infra/nix-infra/protocol"
)

// ShellSyntax is the error of Split and SplitPipes for a text that only a shell could carry out.
type ShellSyntax struct {
	Char    rune   // the character that a shell would act on
	At      int    // its position in the text, in characters, from 1
	Meaning string // what a shell would do there
	Instead string // what to do
}

func (e *ShellSyntax) Error() string {
	return fmt.Sprintf("character %d, %q: %s, and there is no shell here: %s", e.At, e.Char, e.Meaning, e.Instead)
}

// Split makes the words of a command's text, with quotes and backslashes as POSIX has them. It is no shell: where a shell
// would do anything else than split, the error is a *ShellSyntax. So a text never means anything else here than in a
// shell. Patterns like nginx* count, too: a shell puts the names of files there. Quoted, they reach the program.
func Split(text string) ([]string, error) {
	commands, err := split(text, false)
	if err != nil {
		return nil, err
	}
	return commands[0], nil
}

// SplitPipes makes the words of each command of a pipeline: like Split, but each | that is not quoted ends a command.
func SplitPipes(text string) ([][]string, error) { return split(text, true) }

func split(text string, pipes bool) ([][]string, error) {
	if len(text) > protocol.MaxArgSize {
		return nil, fmt.Errorf("the text has %d bytes, %d are possible", len(text), protocol.MaxArgSize)
	}
	if !utf8.ValidString(text) {
		return nil, errors.New("the text is not valid UTF-8")
	}
	if strings.ContainsRune(text, 0) {
		return nil, errors.New("the text has a NUL in it")
	}
	s := splitter{text: []rune(text), pipes: pipes}
	if err := s.run(); err != nil {
		return nil, err
	}
	return s.commands, nil
}

type splitter struct {
	text     []rune
	at       int // index of the character that is looked at
	pipes    bool
	commands [][]string

	words []string // of the command that is read
	word  strings.Builder
	begun bool // a word has begun; it may be empty, as '' is
	plain bool // all of the word so far was without quotes
}

func (s *splitter) run() error {
	for ; s.at < len(s.text); s.at++ {
		switch c := s.text[s.at]; {
		case c == ' ' || c == '\t':
			s.endWord()
		case c == '\'' || c == '"':
			s.begin(false)
			if err := s.quoted(c); err != nil {
				return err
			}
		case c == '\\':
			if s.at++; s.at == len(s.text) {
				return fmt.Errorf("character %d, a backslash, has nothing after it", s.at)
			}
			if s.text[s.at] != '\n' { // a line that goes on
				s.begin(false)
				s.word.WriteRune(s.text[s.at])
			}
		case c == '|' && s.pipes && s.next() != '|' && s.next() != '&':
			s.endWord()
			if err := s.endCommand(); err != nil {
				return err
			}
		default:
			if e := s.syntax(c); e != nil {
				return e
			}
			s.begin(true)
			s.word.WriteRune(c)
		}
	}
	s.endWord()
	return s.endCommand()
}

func (s *splitter) next() rune {
	if s.at+1 < len(s.text) {
		return s.text[s.at+1]
	}
	return 0
}

func (s *splitter) begin(plain bool) {
	s.plain = plain && (s.plain || !s.begun)
	s.begun = true
}

func (s *splitter) endWord() {
	if s.begun {
		s.words = append(s.words, s.word.String())
	}
	s.word.Reset()
	s.begun = false
}

func (s *splitter) endCommand() error {
	switch {
	case len(s.words) == 0 && len(s.commands) == 0 && s.at == len(s.text):
		return errors.New("there is no command")
	case len(s.words) == 0:
		return fmt.Errorf("character %d: there is no command beside the |", min(s.at+1, len(s.text)))
	case len(s.words) > protocol.MaxArgs:
		return fmt.Errorf("the command has %d words, %d are possible", len(s.words), protocol.MaxArgs)
	}
	s.commands = append(s.commands, s.words)
	s.words = nil
	return nil
}

// quoted reads on to the quote that closes the one at s.at.
func (s *splitter) quoted(quote rune) error {
	opened := s.at + 1
	for s.at++; s.at < len(s.text); s.at++ {
		c := s.text[s.at]
		switch {
		case c == quote:
			return nil
		case quote == '"' && (c == '$' || c == '`'):
			return s.found(c, meanings[c], `put a backslash before it, or use '…'`)
		case quote == '"' && c == '\\' && strings.ContainsRune("$`\"\\\n", s.next()):
			if s.at++; s.text[s.at] != '\n' {
				s.word.WriteRune(s.text[s.at])
			}
		default:
			s.word.WriteRune(c)
		}
	}
	return fmt.Errorf("the quote at character %d is never closed", opened)
}

// meanings is what a shell does at a character that is not quoted, wherever it is.
var meanings = map[rune]string{
	';':  "a shell would begin another command there",
	'\n': "a shell would begin another command there",
	'|':  "a shell would hand the output to another command",
	'&':  "a shell would run the command in the background, or another one after it",
	'<':  "a shell would read a file there",
	'>':  "a shell would write a file there",
	'(':  "a shell would run what is in the parentheses",
	')':  "a shell would run what is in the parentheses",
	'$':  "a shell would put something else there",
	'`':  "a shell would run what is between the backticks",
	'{':  "a shell would take what is in the braces apart",
	'}':  "a shell would take what is in the braces apart",
	'*':  "a shell would put the names of files there",
	'?':  "a shell would put the names of files there",
	'[':  "a shell would put the names of files there",
}

// syntax is the error for a character that is not quoted; nil for one that stands for itself.
func (s *splitter) syntax(c rune) error {
	const quote = `quote it ('…') where the program shall get it`
	if meaning := meanings[c]; meaning != "" {
		instead := quote
		switch c {
		case ';', '\n', '&':
			instead = "give one command at a time, or " + quote
		case '|':
			instead = "filter the output where it arrives, or " + quote
		}
		return s.found(c, meaning, instead)
	}
	first := len(s.words) == 0
	switch {
	case c == '#' && !s.begun:
		return s.found(c, "a shell would take the rest for a comment", quote)
	case c == '~' && (!s.begun || s.plain && endsAny(s.word.String(), "=:")):
		return s.found(c, "a shell would put a home folder there", "write the folder, or "+quote)
	case c == '!' && first && !s.begun && strings.ContainsRune("\x00 \t|", s.next()):
		return s.found(c, "a shell would turn the exit status round", "leave it out")
	case c == '=' && first && s.plain && isName(s.word.String()):
		return s.found(c, "a shell would set a variable there", "leave it out: the node's rules say which variables a command gets")
	}
	return nil
}

func (s *splitter) found(c rune, meaning, instead string) error {
	return &ShellSyntax{Char: c, At: s.at + 1, Meaning: meaning, Instead: instead}
}

func endsAny(s, chars string) bool {
	return s != "" && strings.ContainsRune(chars, rune(s[len(s)-1]))
}

// isName tells whether s can be a variable's name, or NAME+ as in NAME+=value.
func isName(s string) bool {
	s = strings.TrimSuffix(s, "+")
	for i, c := range s {
		if c != '_' && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return s != ""
}
