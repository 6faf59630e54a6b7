package project

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

const listed = 12 // names in a message

// hint ends a message about a word that is none of have: with the one that was probably meant, or with
// all of them.
func hint(word, of string, have []string) string {
	if near := nearest(word, have); near != "" {
		return "; did you mean " + show(near) + "?"
	}
	if len(have) == 0 {
		return "; there are no " + of
	}
	more := ""
	if len(have) > listed {
		have, more = have[:listed], fmt.Sprintf(" and %d more", len(have)-listed)
	}
	shown := make([]string, len(have))
	for i, h := range have {
		shown[i] = show(h)
	}
	return "; the " + of + ": " + strings.Join(shown, ", ") + more
}

// nearest gives the word of have that is a slip or two away, "" if none is.
func nearest(word string, have []string) string {
	if len(word) > 100 {
		return ""
	}
	best, least := "", max(1, min(3, len(word)/3))+1
	for _, h := range have {
		if d := distance(strings.ToLower(strings.TrimSpace(word)), strings.ToLower(h)); d < least {
			best, least = h, d
		}
	}
	return best
}

// distance is the number of bytes to insert, remove or change.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// show makes foreign text fit for one line of a message: what is odd in it is quoted, what is long is cut.
func show(s string) string {
	if len(s) > 100 {
		s = s[:100] + "…"
	}
	odd := func(r rune) bool { return !strconv.IsPrint(r) || r == '\ufffd' }
	if s == "" || slices.ContainsFunc([]rune(s), odd) {
		return strconv.Quote(s)
	}
	return s
}
