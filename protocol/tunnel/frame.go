package tunnel

import (
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"strings"
)

// A frame on the wire: a byte for its kind, an 8-byte counter, which is its nonce, and what the kind has, sealed, with
// the kind and the counter bound in. Numbers are big-endian. No kind is a character that JSON can begin with.
type kind byte

const (
	kindData  kind = iota + 1 // offset, bytes of the stream
	kindFin                   // offset of the stream's end
	kindAck                   // received, limit, gap
	kindPing                  // nothing; it is answered with an ack
	kindReset                 // the reason, in UTF-8
)

const (
	maxData   = 64 << 10 // bytes of the stream in one frame
	maxReason = 512      // bytes

	headSize = 1 + 8
	sealSize = 16 // of ChaCha20-Poly1305
	minFrame = headSize + sealSize
	maxFrame = headSize + 8 + maxData + sealSize
)

// IsFrame tells frames from the JSON that else comes on the same subject.
func IsFrame(b []byte) bool {
	return len(b) > 0 && kind(b[0]) >= kindData && kind(b[0]) <= kindReset
}

// frame is one that is opened, or not sealed yet.
type frame struct {
	kind kind

	offset uint64 // of data's first byte in the stream, or of its end; the end itself counts as one byte
	data   []byte

	received uint64 // all before this offset was received
	limit    uint64 // data up to this offset is taken
	gap      uint64 // counter of the newest frame that showed that one before it is missing, plus 1; 0: none is

	reason string
}

// errFrame is a frame that is not for this tunnel, damaged, or seen before. Which of them is nobody's business.
var errFrame = errors.New("not a frame of this tunnel")

// seal appends the frame to dst[:0].
func (f *frame) seal(dst []byte, key cipher.AEAD, counter uint64) []byte {
	dst = append(dst[:0], byte(f.kind))
	dst = binary.BigEndian.AppendUint64(dst, counter)
	switch f.kind {
	case kindData:
		dst = append(binary.BigEndian.AppendUint64(dst, f.offset), f.data...)
	case kindFin:
		dst = binary.BigEndian.AppendUint64(dst, f.offset)
	case kindAck:
		for _, n := range []uint64{f.received, f.limit, f.gap} {
			dst = binary.BigEndian.AppendUint64(dst, n)
		}
	case kindReset:
		dst = append(dst, f.reason...)
	}
	return key.Seal(dst[:headSize], nonce(counter), dst[headSize:], dst[:headSize])
}

// open decrypts a frame in place. Only counters from least on are taken.
func open(b []byte, key cipher.AEAD, least uint64) (f frame, counter uint64, err error) {
	if len(b) < minFrame || len(b) > maxFrame {
		return frame{}, 0, errFrame
	}
	counter = binary.BigEndian.Uint64(b[1:headSize])
	if counter < least {
		return frame{}, 0, errFrame
	}
	plain, err := key.Open(b[headSize:headSize], nonce(counter), b[headSize:], b[:headSize])
	if err != nil {
		return frame{}, 0, errFrame
	}
	f, err = decode(kind(b[0]), plain)
	return f, counter, err
}

// decode reads what was sealed. It keeps a part of b.
func decode(k kind, b []byte) (frame, error) {
	f := frame{kind: k}
	switch k {
	case kindData:
		if len(b) <= 8 || len(b) > 8+maxData {
			return frame{}, errFrame
		}
		f.offset, f.data = binary.BigEndian.Uint64(b), b[8:]
	case kindFin:
		if len(b) != 8 {
			return frame{}, errFrame
		}
		f.offset = binary.BigEndian.Uint64(b)
	case kindAck:
		if len(b) != 24 {
			return frame{}, errFrame
		}
		f.received, f.limit, f.gap = binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])
	case kindPing:
		if len(b) != 0 {
			return frame{}, errFrame
		}
	case kindReset:
		if len(b) > maxReason {
			return frame{}, errFrame
		}
		f.reason = strings.ToValidUTF8(string(b), "\uFFFD")
	default:
		return frame{}, errFrame
	}
	return f, nil
}

func nonce(counter uint64) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, 4, 12), counter)
}
