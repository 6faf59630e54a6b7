package projectfiles

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"regexp"
	"strings"
	"unicode/utf8"
)

// Text is a file's content.
type Text struct {
	Path    string
	Content string // lines end in LF, whatever they end in in the file
	SHA256  string // of the file as it is, in hex
	Mixed   bool   // lines end in CR LF, CR and LF; after a change all of them do in LF

	crlf bool // all lines end in CR LF
}

// Lines are the text's lines, without their ends.
func (t *Text) Lines() []string { return lines(t.Content) }

func lines(content string) []string {
	if content == "" {
		return nil
	}
	return strings.Split(strings.TrimSuffix(content, "\n"), "\n")
}

// Numbered gives lines with their numbers, from the line number from on, as in "L12: text". An empty text is "".
func Numbered(lines []string, from int) string {
	var b strings.Builder
	for i, line := range lines {
		fmt.Fprintf(&b, "L%d: %s\n", from+i, line)
	}
	return b.String()
}

// Read gives the text of a file.
func (f *Folder) Read(name string) (*Text, error) {
	p, err := f.find(name, readable)
	if p != nil {
		defer p.close()
	}
	if err != nil {
		return nil, err
	}
	return p.read(name)
}

func (p *place) read(asked string) (*Text, error) {
	if p.info.IsDir() {
		return nil, failed(asked, "a folder; only files can be read")
	}
	file, err := p.open(asked)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, MaxFile+1))
	switch {
	case err != nil:
		return nil, failed(asked, "%w", reason(err))
	case len(data) > MaxFile:
		return nil, failed(asked, "more than %d KiB, which is too much to be read here", MaxFile>>10)
	case !utf8.Valid(data) || bytes.IndexByte(data, 0) >= 0:
		return nil, failed(asked, "not a text in UTF-8")
	case keyMaterial.Match(data):
		return nil, refuse(asked, "the file has a private key or credentials in it; take them out of the project's files")
	}
	sum := sha256.Sum256(data)
	text := &Text{Path: p.name, SHA256: hex.EncodeToString(sum[:])}
	ends, all := bytes.Count(data, []byte("\r\n")), bytes.Count(data, []byte("\n"))
	text.crlf = ends > 0 && ends == all && ends == bytes.Count(data, []byte("\r"))
	text.Mixed = !text.crlf && bytes.IndexByte(data, '\r') >= 0
	text.Content = normal(string(data))
	return text, nil
}

// normal has all lines end in LF.
func normal(s string) string {
	return strings.ReplaceAll(strings.ReplaceAll(s, "\r\n", "\n"), "\r", "\n")
}

// keyMaterial is what private keys look like: PEM and PGP, age, the seeds and user credentials of NATS, Nix's signing keys (whose
// public halves are shorter).
var keyMaterial = regexp.MustCompile(`-----BEGIN [A-Z ]*PRIVATE KEY( BLOCK)?-----|AGE-SECRET-KEY-(PQ-)?1[0-9A-Z]{20}|-----BEGIN (USER|NATS) [A-Z ]*-----|\bS[UAONCX][A-Z2-7]{56}\b|-[0-9]+:[A-Za-z0-9+/]{86}==`)

// Private tells of a file, by its path below the project and by its content, whether it is not for assistants wherever it lies.
func Private(name string, content []byte) bool {
	clean, err := clean(name)
	return err != nil || isPrivateHere(clean) || keyMaterial.Match(content)
}

// IsFolder tells whether a path leads to a folder. It is an error where nothing is there, or nothing that can be read.
func (f *Folder) IsFolder(name string) (bool, error) {
	p, err := f.find(name, readable)
	if p != nil {
		defer p.close()
	}
	if err != nil {
		return false, err
	}
	return p.info.IsDir(), nil
}

// Result is one of ReadMany.
type Result struct {
	Path string
	Text *Text
	Err  error
}

// ReadMany reads files, each on its own. More than MaxFiles is refused.
func (f *Folder) ReadMany(names []string) ([]Result, error) {
	if len(names) > MaxFiles {
		return nil, fmt.Errorf("%w: %d files are more than the %d that are read at once", ErrRefused, len(names), MaxFiles)
	}
	results := make([]Result, len(names))
	for i, name := range names {
		text, err := f.Read(name)
		results[i] = Result{name, text, err}
	}
	return results, nil
}
