package session

import (
	"bytes"
	"io"
	"os"
	"strings"
	"testing"
	"time"
)

// What a program said before it ended is kept when the session is said to have ended, however late we come to read it, and whatever
// it left running says meanwhile.
func TestLastWordsAreKept(t *testing.T) {
	for name, late := range map[string]struct {
		gather, patience time.Duration
		noise            bool
	}{
		"in time":                 {gather, patience, false},
		"late for each read":      {-1, patience, false},
		"late, and it is noisy":   {-1, 0, true},
		"noise without a pause":   {gather, 0, true},
		"late for all of its end": {gather, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := newSpool()
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			s.gather, s.patience = late.gather, late.patience
			said, output, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			words := strings.Repeat("x", 60_000) + "\nlast words\n" // a pipe holds it
			if _, err := io.WriteString(output, words); err != nil {
				t.Fatal(err)
			}
			exited, ended, quiet := make(chan struct{}), make(chan struct{}), make(chan struct{})
			close(exited)
			go func() {
				defer close(quiet)
				for noise := bytes.Repeat([]byte("left"), 10_000); late.noise; {
					if _, err := output.Write(noise); err != nil {
						return // the session is closed
					}
				}
			}()
			kept := make(chan struct{})
			go func() {
				defer close(kept)
				s.keep(said, exited, func() {
					chunks, _, err := s.read(0, 1000, len(words)+chunkSize)
					if got := strings.Join(chunks, ""); err != nil || !strings.HasPrefix(got, words) {
						t.Errorf("%d of %d bytes are kept, %v", len(got), len(words), err)
					}
					close(ended)
				})
			}()
			select {
			case <-ended:
			case <-time.After(time.Minute):
				t.Error("it does not end")
			}
			said.Close()
			<-quiet
			<-kept
			output.Close()
		})
	}
}
