package mcp

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
)

// Bounds of answers, in bytes. A page's text and its structured half are each bounded by maxPage, and its message
// thus by little more than twice of it.
const (
	maxPage   = 32 << 10
	maxAnswer = 4 << 20     // of one answer, with all its pages
	maxKept   = 32 << 20    // of all answers that are kept to go on with
	maxOfOne  = maxKept / 4 // of those, of one caller
	keepFor   = 10 * time.Minute
	maxCursor = 64
)

// pages are answers of which only the beginning went out. They are kept for a while, so that the pages of an answer are of one
// moment, and nobody is asked again for each. A cursor is the name of one, which nobody can guess, and a place in it; it is
// good for whoever got it.
type pages struct {
	mu   sync.Mutex
	kept []*keptAnswer // the oldest first
}

type keptAnswer struct {
	id     string
	tool   string
	caller Caller
	until  time.Time
	size   int
	answer *rendered
}

func newPages() *pages { return &pages{} }

var errNoCursor = errors.New("there is no answer to go on with by this cursor, or no longer; ask again without it")

// first is the first page of an answer. What comes after it is kept.
func (p *pages) first(c *Call, a *rendered) (*mcp.CallToolResult, error) {
	size := a.bound()
	end := a.fits(0, maxPage)
	if end == len(a.parts) {
		return a.page(0, end, ""), nil
	}
	id := make([]byte, 16)
	rand.Read(id)
	k := &keptAnswer{id: hex.EncodeToString(id), tool: c.tool.Name, caller: c.Caller, until: time.Now().Add(keepFor), size: size, answer: a}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kept = append(p.kept, k)
	p.forget(time.Now())
	return a.page(0, end, k.cursor(end)), nil
}

// forget drops what is over, and of what is too much the oldest: first of a caller who has more than their share.
func (p *pages) forget(now time.Time) {
	all, of := 0, map[Caller]int{}
	var left []*keptAnswer
	for _, k := range slices.Backward(p.kept) { // the newest first
		if all, of[k.caller] = all+k.size, of[k.caller]+k.size; all > maxKept || of[k.caller] > maxOfOne || now.After(k.until) {
			all, of[k.caller] = all-k.size, of[k.caller]-k.size
			continue
		}
		left = append(left, k)
	}
	slices.Reverse(left)
	p.kept = left
}

func (k *keptAnswer) cursor(at int) string { return k.id + "-" + strconv.Itoa(at) }

// next is the page at a cursor. The same cursor gives the same page, as often as it is asked for.
func (p *pages) next(c *Call, cursor string) (*mcp.CallToolResult, error) {
	id, place, _ := strings.Cut(cursor, "-")
	at, err := strconv.Atoi(place)
	if err != nil {
		return nil, errNoCursor
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range p.kept {
		if k.id != id || k.tool != c.tool.Name || k.caller != c.Caller || time.Now().After(k.until) || at <= 0 || at >= len(k.answer.parts) {
			continue
		}
		end, next := k.answer.fits(at, maxPage), ""
		if end < len(k.answer.parts) {
			next = k.cursor(end)
		}
		return k.answer.page(at, end, next), nil
	}
	return nil, errNoCursor
}

// bound drops what is more than an answer may have, and says so. It returns the size of what is left.
func (a *rendered) bound() (size int) {
	for i := range a.parts {
		p := &a.parts[i]
		if size += len(p.head) + len(p.text) + len(p.row); size > maxAnswer {
			a.summary += fmt.Sprintf("\nThis answer is too long even for pages: the last %d of %d results were dropped. Ask for less.", len(a.parts)-i, len(a.parts))
			a.parts = a.parts[:i]
			break
		}
	}
	return size
}

// overhead is what a part takes beside its head, text and row: the lines around untrusted text.
const overhead = 160

// fits is where the page ends that begins at a part and has at most so many bytes: at least one part is on it.
func (a *rendered) fits(at, most int) int {
	text, rows := len(a.summary)+overhead, len(a.summary)+len(notice)+overhead
	for i := at; i < len(a.parts); i++ {
		p := &a.parts[i]
		text += len(p.text) + len(p.head) + overhead
		rows += len(p.row) + 1
		if i > at && max(text, rows) > most {
			return i
		}
	}
	return len(a.parts)
}

// page makes the result of the parts from at to end.
func (a *rendered) page(at, end int, next string) *mcp.CallToolResult {
	s := structured{Summary: a.summary, Notice: notice, Results: []json.RawMessage{}, LeftOut: len(a.parts) - end, Next: next}
	for _, p := range a.parts[at:end] {
		if p.row != nil {
			s.Results = append(s.Results, p.row)
		}
	}
	text := a.text(a.parts[at:end])
	if next != "" {
		text += fmt.Sprintf("\n%d of %d results were left out here. Go on with the input cursor: %q\n", s.LeftOut, len(a.parts), next)
	}
	return &mcp.CallToolResult{Content: []mcp.Content{mcp.NewTextContent(text)}, StructuredContent: marshal(s), IsError: a.failed}
}
