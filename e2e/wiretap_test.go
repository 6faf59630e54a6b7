//go:build linux

package e2e

import (
	"bytes"
	"errors"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
)

// wiretap hears all that the broker carries, by the key of the account itself, which those who have the broker have.
type wiretap struct {
	*raw
	all   *nats.Subscription
	heard [][]byte
}

func (f *fleet) wiretap() *wiretap {
	f.t.Helper()
	account, err := nkeys.FromSeed([]byte(f.keys().Account))
	if err != nil {
		f.t.Fatal(err)
	}
	key, err := nkeys.CreateUser()
	if err != nil {
		f.t.Fatal(err)
	}
	public, err := key.PublicKey()
	if err != nil {
		f.t.Fatal(err)
	}
	user := jwt.NewUserClaims(public)
	user.Name = "wiretap"
	token, err := user.Encode(account)
	if err != nil {
		f.t.Fatal(err)
	}
	w := &wiretap{raw: f.raw(&protocol.Signer{User: token, Key: key}, "_INBOX")}
	if w.all, err = w.SubscribeSync(">"); err != nil {
		f.t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		f.t.Fatal(err)
	}
	return w
}

// carrying counts the messages so far that have some bytes in them.
func (w *wiretap) carrying(data string) (n int) {
	w.t.Helper()
	if err := w.Flush(); err != nil { // what was sent before has come then
		w.t.Fatal(err)
	}
	for {
		m, err := w.all.NextMsg(0)
		if errors.Is(err, nats.ErrTimeout) {
			break
		} else if err != nil {
			w.t.Fatal(err)
		}
		w.heard = append(w.heard, m.Data)
	}
	for _, message := range w.heard {
		if bytes.Contains(message, []byte(data)) {
			n++
		}
	}
	return n
}
