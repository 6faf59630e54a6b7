package protocol

import (
	"fmt"
	"time"
)

// An answer may come in parts, on one reply subject: each Reply has its number as Part, from 1, and More while others
// follow. Some of these end with what was asked for; a stream goes on until who asked for it ends it, or is gone: it
// has to be renewed. Both are the order Stream, sent where the request was sent and taken only from the key that
// made it.
const (
	StreamLifetime = 60 * time.Second // from a stream's begin, or the last time that it was renewed, to its end
	StreamRenewal  = 20 * time.Second // how often who listens renews it
)

// StreamOrder is Stream's: the request whose answer shall go on or, with End, come to its end. Any question that is
// still worked on can be ended.
type StreamOrder struct {
	Request string `json:"request"`
	End     bool   `json:"end,omitempty"`
}

// Validate checks the order's form.
func (o *StreamOrder) Validate() error {
	if !isToken(o.Request) {
		return fmt.Errorf("request id %.80q is not one subject token of at most 64 characters", o.Request)
	}
	return nil
}
