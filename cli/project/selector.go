package project

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// Candidate is a node that a selector may choose.
type Candidate struct {
	Name  string
	Tags  []string
	Facts map[string]string // such as system, nixos, state: what key=value is compared with
}

// Selector chooses nodes; ParseSelector makes one.
type Selector struct {
	terms []term
}

type kind int

const (
	everyone kind = iota
	byName
	byGlob
	byTag
	byFact
)

type term struct {
	kind   kind
	negate bool
	key    string // of a fact
	value  string // name or pattern
	text   string // as it was given, for messages
}

// ParseSelector reads targets: names, globs (web*, n[12]; the rules of path.Match), @tag, key=value on
// facts, and all, separated by commas or spaces, in one argument or in several. "not" before one of them
// takes it away from what the others chose; only such terms mean all but those. Values of facts and tags
// may be globs.
func ParseSelector(exprs []string) (Selector, error) {
	var s Selector
	negate := false
	for _, word := range strings.FieldsFunc(strings.Join(exprs, " "), func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) }) {
		if word == "not" {
			if negate {
				return Selector{}, errors.New("targets: \"not\" stands before another \"not\"")
			}
			negate = true
			continue
		}
		t, err := parseTerm(word)
		if err != nil {
			return Selector{}, err
		}
		t.negate, negate = negate, false
		s.terms = append(s.terms, t)
	}
	switch {
	case negate:
		return Selector{}, errors.New("targets: nothing follows \"not\"; expected such as not @canary")
	case len(s.terms) == 0:
		return Selector{}, errors.New("no targets; expected such as web1, web*, @tag, key=value or all")
	}
	return s, nil
}

func parseTerm(word string) (term, error) {
	t := term{kind: byName, value: word, text: word}
	key, value, isFact := strings.Cut(word, "=")
	switch {
	case word == "all":
		t.kind = everyone
		return t, nil
	case word[0] == '@':
		t.kind, t.value = byTag, word[1:]
	case isFact:
		t.kind, t.key, t.value = byFact, key, value
	case strings.ContainsAny(word, `*?[\`):
		t.kind = byGlob
	}
	if t.value == "" || isFact && t.kind == byFact && key == "" {
		return t, fmt.Errorf("target %s: expected @tag or key=value", show(word))
	}
	if _, err := path.Match(t.value, ""); err != nil && t.kind != byName {
		return t, fmt.Errorf("target %s: a bad pattern; * is any text, ? one character, [abc] one of those", show(word))
	}
	return t, nil
}

// Match tells whether the selector chooses c.
func (s Selector) Match(c Candidate) bool {
	chosen, positive := false, false
	for _, t := range s.terms {
		switch {
		case !t.negate:
			positive = true
			chosen = chosen || t.match(c)
		case t.match(c):
			return false
		}
	}
	return chosen || !positive && len(s.terms) > 0
}

func (t term) match(c Candidate) bool {
	switch t.kind {
	case everyone:
		return true
	case byName:
		return c.Name == t.value
	case byGlob:
		return glob(t.value, c.Name)
	case byTag:
		return slices.ContainsFunc(c.Tags, func(tag string) bool { return glob(t.value, tag) })
	case byFact:
		fact, ok := c.Facts[t.key]
		return ok && glob(t.value, fact)
	}
	return false
}

func glob(pattern, s string) bool {
	ok, err := path.Match(pattern, s)
	return err == nil && ok
}

// Select gives those of from that the targets choose, sorted by name. A term that matches nobody is an
// error, also after "not": a slip there would hit who was to be spared. The one exception is the value of
// a fact that others have, as in not state=lost.
func Select(exprs []string, from []Candidate) ([]Candidate, error) {
	s, err := ParseSelector(exprs)
	if err != nil {
		return nil, err
	}
	if len(from) == 0 {
		return nil, errors.New("no nodes are known yet; `nix-infra enroll` brings one into the fleet")
	}
	var errs []error
	for _, t := range s.terms {
		if !slices.ContainsFunc(from, t.match) && !t.mayMiss(from) {
			errs = append(errs, t.missed(from))
		}
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	var chosen []Candidate
	for _, c := range from {
		if s.Match(c) {
			chosen = append(chosen, c)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("targets %s: nobody is left after what \"not\" takes away", show(strings.Join(exprs, " ")))
	}
	slices.SortStableFunc(chosen, func(a, b Candidate) int { return strings.Compare(a.Name, b.Name) })
	return chosen, nil
}

func (t term) mayMiss(from []Candidate) bool {
	return t.negate && t.kind == byFact && slices.ContainsFunc(from, func(c Candidate) bool {
		_, ok := c.Facts[t.key]
		return ok
	})
}

// missed says what there would have been to match.
func (t term) missed(from []Candidate) error {
	var have []string
	of := "nodes"
	for _, c := range from {
		switch t.kind {
		case byTag:
			of, have = "tags", append(have, c.Tags...)
		case byFact:
			of = "facts"
			for key, value := range c.Facts {
				have = append(have, key+"="+value)
			}
		default:
			have = append(have, c.Name)
		}
	}
	slices.Sort(have)
	have = slices.Compact(have)
	wanted := t.value
	if t.kind == byFact {
		wanted = t.text
	}
	return fmt.Errorf("target %s matches no node%s", show(t.text), hint(wanted, of, have))
}
