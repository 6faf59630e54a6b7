package project

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"unicode/utf8"
)

// Env is the environment file over the environment: a variable that the file sets counts, even as empty.
type Env struct {
	Process func(string) string // the environment; nil means os.Getenv

	file map[string]string
}

// Get gives a variable's value, "" when it is not set.
func (e Env) Get(name string) string {
	if value, ok := e.file[name]; ok {
		return value
	}
	return e.process(name)
}

func (e Env) process(name string) string {
	if e.Process == nil {
		return os.Getenv(name)
	}
	return e.Process(name)
}

func readEnv(dir, name string) (Env, error) {
	path := filepath.Join(dir, ".env")
	if name != "" {
		path = locate(dir, name)
	}
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && name == "":
		return Env{}, nil
	case errors.Is(err, fs.ErrNotExist):
		return Env{}, fmt.Errorf("the environment file %s exists neither below %s nor here", name, dir)
	case err != nil:
		return Env{}, fmt.Errorf("the environment file: %w", err)
	}
	if rel, err := filepath.Rel(dir, path); err == nil && filepath.IsLocal(rel) {
		path = rel
	}
	return parseEnv(path, string(text), os.Getenv)
}

var (
	assignment  = regexp.MustCompile(`^(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*(.*)$`)
	exportsOnly = regexp.MustCompile(`^export([ \t]+[A-Za-z_][A-Za-z0-9_]*)+[ \t]*$`)
	variable    = regexp.MustCompile(`^(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))`)
)

// parseEnv reads what bash reads from such a file when the wrapper scripts source it, and refuses what
// bash would run: KEY=value lines, comments, an export before them, quotes, $NAME and ${NAME}. Spaces
// without quotes, which other readers of .env allow, are kept.
func parseEnv(path, text string, process func(string) string) (Env, error) {
	e := Env{file: map[string]string{}}
	lookup := func(name string) string {
		if value, ok := e.file[name]; ok {
			return value
		}
		return process(name)
	}
	var errs []error
	for n, line := range strings.Split(strings.TrimPrefix(text, "\ufeff"), "\n") {
		line = strings.TrimLeft(strings.TrimRight(line, "\r"), " \t")
		if line == "" || line[0] == '#' || exportsOnly.MatchString(line) {
			continue
		}
		fail := func(what string) { errs = append(errs, fmt.Errorf("%s:%d: %s", path, n+1, what)) }
		parts := assignment.FindStringSubmatch(line)
		switch {
		case !utf8.ValidString(line) || strings.ContainsRune(line, 0):
			fail("not text: save the file as UTF-8")
			continue
		case parts == nil:
			fail("expected NAME=value") // the line itself may be a secret
			continue
		}
		value, err := envValue(parts[2], lookup)
		if err != nil {
			fail(parts[1] + ": " + err.Error())
			continue
		}
		e.file[parts[1]] = value
	}
	return e, errors.Join(errs...)
}

// envValue undoes the quoting of what follows the equals sign.
func envValue(s string, lookup func(string) string) (string, error) {
	var value strings.Builder
	var quote byte // ' or ", or 0 outside
	kept := 0      // length that the trimming of unquoted spaces at the end must leave
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case quote == '\'' && c != '\'':
			value.WriteByte(c)
		case c == '\'' && quote != '"', c == '"':
			quote ^= c
			kept = value.Len()
		case c == '#' && quote == 0 && (i == 0 || s[i-1] == ' ' || s[i-1] == '\t'):
			i = len(s)
		case c == '\\':
			if i++; i == len(s) {
				return "", errors.New("a backslash at the end of the line; a value is one line")
			}
			if quote == '"' && !strings.ContainsRune("\"\\$`", rune(s[i])) {
				value.WriteByte('\\')
			}
			value.WriteByte(s[i])
			kept = value.Len()
		case c == '$':
			name := variable.FindStringSubmatch(s[i+1:])
			switch {
			case name != nil:
				value.WriteString(lookup(name[1] + name[2]))
				i += len(name[0])
			case i+1 < len(s) && !strings.ContainsRune(" \t\"'", rune(s[i+1])):
				return "", errors.New("only $NAME and ${NAME} are filled in; to mean the sign itself, put the value in single quotes")
			default:
				value.WriteByte('$')
			}
			kept = value.Len()
		case c == '`':
			return "", errors.New("a backquote would run a command; put the value in single quotes")
		default:
			value.WriteByte(c)
		}
	}
	if quote != 0 {
		return "", fmt.Errorf("the quote %c is not closed on the same line", quote)
	}
	all := value.String()
	return all[:kept] + strings.TrimRight(all[kept:], " \t"), nil
}
