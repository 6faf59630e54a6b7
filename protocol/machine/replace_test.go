package machine

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// enrolled is a node, and its public keys.
func enrolled(t *testing.T, o *operator) (h Home, key, xkey string) {
	t.Helper()
	h = Home{Dir: t.TempDir(), Role: protocol.Node}
	r, err := h.Request("m1")
	must(t, err)
	_, err = h.Load(protocol.Encode(o.answer(t, r)))
	must(t, err)
	return h, r.Key, r.XKey
}

// holds checks which keys a node has.
func (h Home) holds(t *testing.T, what, key, xkey string, next bool) {
	t.Helper()
	m, err := h.Open()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	gotKey, err := m.Key.PublicKey()
	must(t, err)
	gotXKey, err := m.XKey.PublicKey()
	must(t, err)
	if gotKey != key || gotXKey != xkey || (m.NextXKey != nil) != next {
		t.Errorf("%s: it has %s and %s, next is %v; want %s and %s", what, gotKey, gotXKey, m.NextXKey, key, xkey)
	}
	if err := m.Answer.For(m.Key); err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// TestReplace breaks replacing off after each change of a file: the node has all of the old keys, or all of the new ones.
func TestReplace(t *testing.T) {
	o := newOperator(t)
	h, key, xkey := enrolled(t, o)
	next, err := h.Replacement()
	must(t, err)
	must(t, next.Request.Validate())
	h.holds(t, "keys are made", key, xkey, true)
	again, err := h.Replacement()
	must(t, err)
	if again.Request.Key != next.Request.Key || again.Request.XKey != next.Request.XKey {
		t.Error("other keys were made at the second time")
	}

	_, other, _ := enrolled(t, o)
	for what, public := range map[string]string{"the key that it has": key, "somebody else's": other} {
		token, err := o.keys.Issue("m1", protocol.Node, public, time.Time{})
		must(t, err)
		if err := h.Replace(token); err == nil {
			t.Errorf("took a JWT for %s", what)
		}
	}
	h.holds(t, "others were refused", key, xkey, true)

	token, err := o.keys.IssueNode("m1", next.Request.Key, next.Request.XKey)
	must(t, err)
	must(t, h.Replace(token))
	key, xkey = next.Request.Key, next.Request.XKey
	h.holds(t, "replaced", key, xkey, false)
	curve := filepath.Join(h.Dir, xkeyFile)
	must(t, os.Rename(curve+nextSuffix, curve))
	h.holds(t, "replaced, and one file in place", key, xkey, false)
	_, err = h.Resume()
	must(t, err)
	h.holds(t, "resumed", key, xkey, false)
	var files []string
	entries, err := os.ReadDir(h.Dir)
	must(t, err)
	for _, e := range entries {
		info, err := e.Info()
		must(t, err)
		if files = append(files, e.Name()); info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", e.Name(), info.Mode())
		}
	}
	if !slices.Equal(files, []string{xkeyFile, answerFile, keyFile}) {
		t.Errorf("there are %v", files)
	}
	third, err := h.Replacement()
	must(t, err)
	if third.Request.Key == key || third.Request.XKey == xkey {
		t.Error("the keys that it has are offered as new ones")
	}
}

// TestEnrolAfterReplace: a node that was ended before its new keys had their names is enrolled again with those.
func TestEnrolAfterReplace(t *testing.T) {
	o := newOperator(t)
	h, _, _ := enrolled(t, o)
	next, err := h.Replacement()
	must(t, err)
	token, err := o.keys.IssueNode("m1", next.Request.Key, next.Request.XKey)
	must(t, err)
	must(t, h.Replace(token))
	r, err := h.Request("m1")
	must(t, err)
	if r.Key != next.Request.Key || r.XKey != next.Request.XKey {
		t.Error("it asks with the keys that it had before")
	}
	_, err = h.Load(protocol.Encode(o.answer(t, r)))
	must(t, err)
	h.holds(t, "enrolled again", r.Key, r.XKey, false)
}
