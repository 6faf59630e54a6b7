package ui

import (
	"strings"
	"unicode/utf8"
)

// Cell is text in a table. It is cleaned when it is printed.
type Cell struct {
	Text   string
	Colour Colour
}

// Text makes plain cells.
func Text(texts ...string) []Cell {
	cells := make([]Cell, len(texts))
	for i, t := range texts {
		cells[i].Text = t
	}
	return cells
}

// Table prints rows below headings, columns as wide as they need to be. On a terminal, rows are cut at
// its width, which only ever shortens the last columns.
func (t *Terminal) Table(headings []string, rows [][]Cell) {
	all := [][]Cell{make([]Cell, len(headings))}
	for i, h := range headings {
		all[0][i] = Cell{h, Bold}
	}
	all = append(all, rows...)
	widths := make([]int, len(headings))
	for _, row := range all {
		for i := range row {
			row[i].Text = Clean(row[i].Text)
			if i < len(widths) {
				widths[i] = max(widths[i], utf8.RuneCountInString(row[i].Text))
			}
		}
	}
	limit := 1 << 20
	if t.tty {
		limit, _ = t.size()
	}
	var b strings.Builder
	for _, row := range all {
		t.row(&b, row, widths, limit)
	}
	t.Printf("%s", b.String())
}

func (t *Terminal) row(b *strings.Builder, row []Cell, widths []int, left int) {
	last := len(row) - 1
	for last > 0 && row[last].Text == "" {
		last--
	}
	for i := 0; i <= last && left > 0; i++ {
		text := Cut(row[i].Text, left)
		n := utf8.RuneCountInString(text)
		b.WriteString(t.Paint(row[i].Colour, text))
		left -= n
		if i < last {
			gap := min(widths[i]-n+2, left)
			b.WriteString(strings.Repeat(" ", gap))
			left -= gap
		}
	}
	b.WriteByte('\n')
}
