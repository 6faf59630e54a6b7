package session

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

// Bounds of what is kept, in bytes.
const (
	chunkSize = 8 << 10
	maxOutput = 64 << 20               // of a session; of what comes after, only the end is kept
	tailSize  = 64 << 10               // of that end
	gather    = 100 * time.Millisecond // what comes in this time is one chunk
	patience  = 2 * time.Second        // for what a program that is gone has left running, and that goes on to speak
	maxPipe   = 1 << 20                // that a pipe holds: nobody but root can make one hold more
)

// spool keeps what a program says in a file, as chunks of whole characters.
type spool struct {
	gather, patience time.Duration

	mu   sync.Mutex
	file *os.File
	ends []int64 // of the chunks, in the file

	dropped int64
	tail    []byte // of what was dropped
}

// newSpool makes a spool whose file has no name any more, so that nothing of it is left when we end, however we do.
func newSpool() (*spool, error) {
	file, err := os.CreateTemp("", "nix-infra-session-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(file.Name()); err != nil {
		file.Close()
		return nil, err
	}
	return &spool{file: file, gather: gather, patience: patience}, nil
}

// keep keeps what comes from the pipe said. It calls ended once: when the program has ended (exited is closed) and all
// that it said until then is kept. What it left running may hold the pipe for longer, and go on to speak.
func (s *spool) keep(said *os.File, exited <-chan struct{}, ended func()) {
	var part []byte
	var since time.Time // when the program was first seen to be gone
	after := 0          // bytes that were read since then
	buffer := make([]byte, chunkSize)
	over := false
	finish := func() {
		if !over {
			over = true
			s.add(part, true)
			part = nil
			s.addTail()
			ended()
		}
	}
	for {
		select {
		case <-exited:
			if since.IsZero() {
				since = time.Now()
			}
		default:
		}
		// A deadline gathers what comes in short time, and has a look at exited now and then.
		deadline := time.Now().Add(s.gather)
		if over && len(part) == 0 {
			deadline = time.Time{}
		}
		_ = said.SetReadDeadline(deadline) // a pipe has deadlines
		n, err := said.Read(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			n, err = readNow(said, buffer) // where we were late, it was over before anything was read
		}
		part = append(part, buffer[:n]...)
		if !since.IsZero() {
			after += n
		}
		quiet := errors.Is(err, syscall.EAGAIN)
		if len(part) >= chunkSize || quiet {
			part = s.add(part, false)
		}
		switch {
		case err != nil && !quiet:
			<-exited // it may have closed its output, and work on
			finish()
			return
		// The program was gone before we looked, and the pipe is empty, or all that it held then has been read.
		case !since.IsZero() && (quiet || time.Since(since) > s.patience && (n < len(buffer) || after >= maxPipe)):
			finish()
		}
	}
}

// readNow reads what a pipe holds; the error is EAGAIN where it is empty.
func readNow(pipe *os.File, buffer []byte) (n int, err error) {
	conn, err := pipe.SyscallConn()
	if err == nil {
		err = pipe.SetReadDeadline(time.Time{})
	}
	if err != nil {
		return 0, err
	}
	var failed error
	err = conn.Read(func(fd uintptr) bool {
		for {
			if n, failed = syscall.Read(int(fd), buffer); failed != syscall.EINTR {
				return true
			}
		}
	})
	switch {
	case err == nil && failed == nil && n == 0:
		err = io.EOF
	case err == nil:
		err = failed
	}
	return max(n, 0), err
}

// add keeps text, and gives back what is not a whole character yet.
func (s *spool) add(text []byte, all bool) (rest []byte) {
	for len(text) > 0 {
		n := min(len(text), chunkSize)
		if n < len(text) || !all {
			n = whole(text[:n])
		}
		if n == 0 {
			break
		}
		s.put(text[:n])
		text = text[n:]
	}
	return text
}

// whole is how much of a text is whole characters: all of it, but for the beginning of one at its end.
func whole(text []byte) int {
	for i := 1; i <= min(len(text), utf8.UTFMax); i++ {
		if c := text[len(text)-i]; utf8.RuneStart(c) {
			if !utf8.FullRune(text[len(text)-i:]) {
				return len(text) - i
			}
			break
		}
	}
	return len(text)
}

func (s *spool) put(chunk []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dropped > 0 || s.size()+int64(len(chunk)) > maxOutput {
		s.dropped += int64(len(chunk))
		s.tail = append(s.tail, chunk...)
		if len(s.tail) > tailSize {
			s.tail = append([]byte(nil), s.tail[len(s.tail)-tailSize:]...)
		}
		return
	}
	s.write(chunk)
}

func (s *spool) write(chunk []byte) {
	at := s.size()
	if _, err := s.file.WriteAt(chunk, at); err != nil {
		s.dropped += int64(len(chunk)) // the disk is full
		return
	}
	s.ends = append(s.ends, at+int64(len(chunk)))
}

// addTail keeps the end of what was too much.
func (s *spool) addTail() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dropped == 0 {
		return
	}
	s.write(fmt.Appendf(nil, "\n[%d bytes were left out here]\n", s.dropped-int64(len(s.tail))))
	for tail := s.tail; len(tail) > 0; {
		n := min(len(tail), chunkSize)
		s.write(tail[:n])
		tail = tail[n:]
	}
	s.tail = nil
}

func (s *spool) size() int64 {
	if len(s.ends) == 0 {
		return 0
	}
	return s.ends[len(s.ends)-1]
}

// read gives chunks, from a number on.
func (s *spool) read(from, count, maxBytes int) (chunks []string, total int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	total = len(s.ends)
	if s.file == nil {
		return nil, total, errors.New("the session is forgotten")
	}
	for i := max(from, 0); i < total && len(chunks) < count; i++ {
		var begin int64
		if i > 0 {
			begin = s.ends[i-1]
		}
		size := int(s.ends[i] - begin)
		if len(chunks) > 0 && size > maxBytes {
			break
		}
		maxBytes -= size
		chunk := make([]byte, size)
		if _, err := s.file.ReadAt(chunk, begin); err != nil && !errors.Is(err, io.EOF) {
			return nil, total, err
		}
		chunks = append(chunks, string(chunk))
	}
	return chunks, total, nil
}

// kept is how many bytes are in the file.
func (s *spool) kept() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size()
}

// close drops what is kept.
func (s *spool) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}
