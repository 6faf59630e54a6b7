package tunnel

import "errors"

// errViolation is an other end that does not keep to what was agreed on. It has the keys, so it is no stranger's doing.
var errViolation = errors.New("it does not keep to the protocol")

// inbound is what comes in.
type inbound struct {
	window   uint64
	chunks   [][]byte // not read yet
	buffered uint64   // bytes in chunks
	received uint64   // offset up to which all came; the end counts as one byte
	ended    bool
	told     uint64 // limit that the other end was told
	gap      uint64 // see frame
}

// limit is the offset up to which there is room.
func (i *inbound) limit() uint64 { return i.received - i.buffered + i.window }

// worthTelling says whether so much was read since the limit was told that the other end may wait for it. A quarter
// of the window is also the most that one frame has.
func (i *inbound) worthTelling() bool { return !i.ended && i.limit()-i.told >= i.window/4 }

// take takes a frame with data, or with the end. What is there already is left out, and what does not follow on
// what is there is not kept.
func (i *inbound) take(f frame, counter uint64) error {
	switch {
	case f.offset > i.received:
		i.gap = counter + 1
		return nil
	case f.kind == kindFin:
		if f.offset < i.received && !(i.ended && f.offset == i.received-1) {
			return errViolation
		}
		if !i.ended {
			i.ended, i.gap = true, 0
			i.received++
		}
		return nil
	}
	if !i.news(f) {
		return nil
	}
	fresh := f.data[i.received-f.offset:]
	if i.received+uint64(len(fresh)) > i.told {
		return errViolation
	}
	i.received += uint64(len(fresh))
	i.buffered += uint64(len(fresh))
	i.chunks = append(i.chunks, fresh)
	i.gap = 0
	return nil
}

// news tells whether a frame has data that is not there yet.
func (i *inbound) news(f frame) bool {
	return f.kind == kindData && !i.ended && (f.offset > i.received || i.received-f.offset < uint64(len(f.data)))
}

// ack says what is there.
func (i *inbound) ack() frame {
	i.told = max(i.told, i.limit())
	return frame{kind: kindAck, received: i.received, limit: i.told, gap: i.gap}
}

func (i *inbound) read(p []byte) int {
	n := 0
	for len(i.chunks) > 0 && n < len(p) {
		took := copy(p[n:], i.chunks[0])
		n += took
		if i.chunks[0] = i.chunks[0][took:]; len(i.chunks[0]) == 0 {
			i.chunks[0] = nil
			i.chunks = i.chunks[1:]
		}
	}
	i.buffered -= uint64(n)
	return n
}

func (i *inbound) discard() { i.chunks, i.buffered = nil, 0 }
