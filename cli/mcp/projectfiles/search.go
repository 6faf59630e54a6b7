package projectfiles

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"
)

// What a search takes, at most.
const (
	MaxMatches  = 500
	maxPattern  = 1000     // bytes
	maxLine     = 400      // bytes of a line that is shown
	longLine    = 1 << 10  // bytes; in a longer one, time is looked at while it is searched
	maxSearched = 64 << 20 // bytes that are looked through
	searchTime  = 20 * time.Second
)

// Search says what is looked for.
type Search struct {
	Path    string // file or folder
	Pattern string // a regular expression in RE2's syntax, of one line
	Glob    string // of the files' names, or of their paths where it has a slash; "" is all
	NoCase  bool
}

// Match is a line.
type Match struct {
	File    string `json:"file"`
	Line    int    `json:"line"`
	Content string `json:"content"` // without the space around it
}

// Search gives the lines that match, in order, and why there may be more ("" where there are none). What is not open is passed by, and so is
// what can't be read as text; that is told.
func (f *Folder) Search(ctx context.Context, s Search) (matches []Match, more string, err error) {
	re, err := s.compile()
	if err != nil {
		return nil, "", err
	}
	p, err := f.find(s.Path, readable)
	if p != nil {
		defer p.close()
	}
	if err != nil {
		return nil, "", err
	}
	bounded, cancel := context.WithTimeout(ctx, searchTime)
	defer cancel()
	searched := 0
	unread := 0
	visit := func(e Entry, p *place) error {
		if e.Type != "file" || !s.wants(e.Path) {
			return nil
		}
		text, err := p.read(e.Path)
		if err != nil {
			unread++
			return nil
		}
		if searched += len(text.Content); searched > maxSearched {
			more = fmt.Sprintf("after %d MiB the search stopped; look in a smaller folder", maxSearched>>20)
			return fs.SkipAll
		}
		for i, line := range text.Lines() {
			matched := matchIn(bounded, re, line)
			switch {
			case bounded.Err() != nil:
				return bounded.Err()
			case !matched:
				continue
			}
			if len(matches) == MaxMatches {
				more = fmt.Sprintf("there are more than %d lines; look for something narrower", MaxMatches)
				return fs.SkipAll
			}
			matches = append(matches, Match{e.Path, i + 1, short(strings.TrimSpace(line))})
		}
		return nil
	}
	if p.info.IsDir() {
		err = f.walk(bounded, p, visit)
	} else if _, unread := p.read(s.Path); unread != nil {
		return nil, "", unread // who names one file hears why it can't be searched
	} else if err = visit(Entry{p.name, p.info.Size(), "file"}, p); errors.Is(err, fs.SkipAll) {
		err = nil
	}
	if bounded.Err() != nil && ctx.Err() == nil {
		more, err = fmt.Sprintf("after %v the search stopped; look in a smaller folder", searchTime), nil
	}
	if more == "" && unread > 0 {
		more = fmt.Sprintf("%d files were not looked through, because they are large, or no text that is shown", unread)
	}
	return matches, more, err
}

// matchIn matches a line. An expression takes as many steps for a byte as it has parts, and a file may be one line: there ctx is
// heeded in between.
func matchIn(ctx context.Context, re *regexp.Regexp, line string) bool {
	if len(line) <= longLine {
		return re.MatchString(line)
	}
	return re.MatchReader(&runes{ctx: ctx, r: strings.NewReader(line)})
}

// runes reads a text until ctx ends.
type runes struct {
	ctx context.Context
	r   *strings.Reader
}

func (r *runes) ReadRune() (rune, int, error) {
	if r.ctx.Err() != nil {
		return 0, 0, io.EOF
	}
	return r.r.ReadRune()
}

func (s Search) compile() (*regexp.Regexp, error) {
	switch {
	case s.Pattern == "":
		return nil, errors.New("pattern: what to look for is missing; give a regular expression, such as services\\.nginx")
	case len(s.Pattern) > maxPattern:
		return nil, fmt.Errorf("pattern: it may have %d bytes, this one has %d", maxPattern, len(s.Pattern))
	}
	expr := s.Pattern
	if s.NoCase {
		expr = "(?i)" + expr
	}
	re, err := regexp.Compile(expr)
	if err != nil {
		return nil, fmt.Errorf("pattern: %s: not a regular expression of RE2: %s", quote(s.Pattern), strings.TrimPrefix(err.Error(), "error parsing regexp: "))
	}
	if _, err := path.Match(s.Glob, ""); err != nil || len(s.Glob) > maxPattern || !utf8.ValidString(s.Glob) {
		return nil, fmt.Errorf("file-pattern: %s: not a pattern of file names, such as *.nix", quote(s.Glob))
	}
	return re, nil
}

func (s Search) wants(name string) bool {
	if s.Glob == "" {
		return true
	}
	if !strings.Contains(s.Glob, "/") {
		name = path.Base(name)
	}
	ok, _ := path.Match(s.Glob, name)
	return ok
}

func short(line string) string {
	if len(line) <= maxLine {
		return line
	}
	return strings.ToValidUTF8(line[:maxLine], "") + "…"
}
