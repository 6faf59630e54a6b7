package client

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"

	"github.com/nix-infra/nix-infra/protocol"
)

// Each writer's records are a chain: a record names the number and the digest of the one before it. Whoever keeps the
// record, and whoever carries it here, can withhold, and can't change, remove, reorder or repeat anything without its
// showing, except at the two ends: what retention let go of is gone from the beginning, and what was cut off at the end
// may not have been there. Of that end, what somebody saw once has to be there ever after (ChainCheck.Seen).

// FindingKind says what is the matter with a chain.
type FindingKind string

// Faults: somebody changed the record, or lost a part of it.
const (
	Missing    FindingKind = "missing"    // records were removed, or never got here
	Changed    FindingKind = "changed"    // a record has not the content that the one after it names
	Reordered  FindingKind = "reordered"  // a record comes after one that was written later
	Duplicated FindingKind = "duplicated" // a record is there twice
	Forked     FindingKind = "forked"     // two different records have one number
	Foreign    FindingKind = "foreign"    // a record says that somebody else wrote it
	Damaged    FindingKind = "damaged"    // what is there is no record
	Gone       FindingKind = "gone"       // a record that was seen before is not there
)

// Notes: nothing is wrong.
const (
	Cut       FindingKind = "cut"        // the stream's retention has let go of the oldest records
	Restarted FindingKind = "restarted"  // the writer was set up anew and began another chain
	SentAgain FindingKind = "sent-again" // the writer was not sure that its newest records had arrived
)

// Fault tells whether the finding is one that must not be.
func (k FindingKind) Fault() bool { return k != Cut && k != Restarted && k != SentAgain }

// Finding is something about a writer's chain. From and To are the records that it is about, by the writer's numbers.
type Finding struct {
	Kind   FindingKind
	Writer string // such as "node web1"; "" for the stream itself, whose own numbers From and To are then
	From   uint64
	To     uint64
	Number uint64 // the place in the stream at which it showed
	Reason string
}

// Chain is a writer's records, summed up.
type Chain struct {
	Writer      string
	Records     int
	First, Last uint64 // by the writer's numbers, of its last chain
	Head        string // digest of the last record
	Number      uint64 // its place in the stream
}

// Seen is the last record of a writer's chain, as somebody saw it who verified that.
type Seen struct {
	Seq    uint64 `json:"seq"`
	Digest string `json:"digest"`
	Number uint64 `json:"number"` // its place in the stream
}

// ChainCheck follows all writers' chains at once, record for record in the stream's order, from First of the stream on.
// It keeps 8 bytes for each record.
type ChainCheck struct {
	First uint64          // of the stream
	Seen  map[string]Seen // by writer: what has to be there; what came is taken out, and at the end what retention has let go of
	More  int             // faults that were found after the first maxFindings

	next     uint64
	writers  map[string]*writer
	findings []Finding
}

const maxFindings = 10_000

// writer is how far a chain is.
type writer struct {
	Chain
	runs  []run             // what came in order; between them is what is missing
	late  map[uint64]uint64 // what came after later ones: beginnings of digests, by number
	again uint64            // the number up to which records have come once more, in a row; 0: none is under way
	from  uint64            // where those began
	at    uint64            // and their place in the stream
}

// run is records without a gap: the beginnings of their digests, from number first on.
type run struct {
	first   uint64
	digests []uint64
}

// Add takes the stream's next record. Those that came in one message have its number.
func (c *ChainCheck) Add(r protocol.StoredRecord) {
	if c.writers == nil {
		c.writers, c.next = map[string]*writer{}, c.First
	}
	if r.Number > c.next {
		c.find(Finding{Missing, "", c.next, r.Number - 1, r.Number, "the stream does not have these any more, and has older ones"})
	}
	c.next = r.Number + 1
	name, who, ok := protocol.AuditWriter(r.Subject)
	if !ok {
		c.find(Finding{Foreign, "", r.Number, r.Number, r.Number, fmt.Sprintf("nobody who keeps a record writes to %.100q", r.Subject)})
		return
	}
	w := c.writers[who]
	if w == nil {
		w = &writer{Chain: Chain{Writer: who}}
		c.writers[who] = w
	}
	w.Records++
	digest := protocol.Digest(r.Data)
	if c.Seen[who].Digest == digest {
		delete(c.Seen, who)
	}
	record, err := protocol.Decode[protocol.AuditRecord](r.Data)
	if err != nil || record.Seq == 0 || record.Seq > maxSeq {
		c.find(Finding{Damaged, who, 0, 0, r.Number, fmt.Sprintf("after record %d there is something that is no record", w.Last)})
		return
	}
	if record.At != name {
		c.find(Finding{Foreign, who, record.Seq, record.Seq, r.Number, fmt.Sprintf("it says that %.63q wrote it", record.At)})
	}
	c.follow(w, &record, digest, r.Number)
}

// follow takes a record of a writer.
func (c *ChainCheck) follow(w *writer, r *protocol.AuditRecord, digest string, number uint64) {
	find := func(k FindingKind, from, to uint64, format string, args ...any) {
		c.find(Finding{k, w.Writer, from, to, number, fmt.Sprintf(format, args...)})
	}
	switch {
	case w.Last == 0:
		w.First = r.Seq
		if r.Seq > 1 && c.First > 1 {
			find(Cut, 1, r.Seq-1, "the stream's retention has let go of them")
		} else if r.Seq > 1 {
			find(Missing, 1, r.Seq-1, "the stream begins with its first record, and has none of these")
		} else if r.Prev != "" {
			find(Changed, 1, 1, "it is the first, and continues another")
		}
	case r.Seq <= w.Last:
		c.earlier(w, r, digest, number)
		return
	default:
		c.endAgain(w)
		if r.Seq == w.Last+1 && r.Prev != w.Head {
			find(Changed, w.Last, w.Last, "record %d continues another one than this", r.Seq)
		}
	}
	w.add(r.Seq, digest, number)
}

// maxSeq is more than any writer comes to.
const maxSeq = 1 << 62

// add goes on with a record that is the newest.
func (w *writer) add(seq uint64, digest string, number uint64) {
	if len(w.runs) == 0 || seq != w.Last+1 {
		w.runs = append(w.runs, run{first: seq})
	}
	last := &w.runs[len(w.runs)-1]
	last.digests = append(last.digests, short(digest))
	w.Last, w.Head, w.Number = seq, digest, number
}

// known is the beginning of the digest of the record that came with a number, 0 where none did.
func (w *writer) known(seq uint64) uint64 {
	if d := w.late[seq]; d != 0 {
		return d
	}
	i, found := slices.BinarySearchFunc(w.runs, seq, func(r run, seq uint64) int { return cmp.Compare(r.first, seq) })
	if !found {
		i--
	}
	if i < 0 || seq-w.runs[i].first >= uint64(len(w.runs[i].digests)) {
		return 0
	}
	return w.runs[i].digests[seq-w.runs[i].first]
}

// earlier takes a record whose number is not above the last one's.
func (c *ChainCheck) earlier(w *writer, r *protocol.AuditRecord, digest string, number uint64) {
	find := func(k FindingKind, format string, args ...any) {
		c.find(Finding{k, w.Writer, r.Seq, r.Seq, number, fmt.Sprintf(format, args...)})
	}
	known := w.known(r.Seq)
	if known == short(digest) {
		c.repeat(w, r.Seq, number)
		return
	}
	c.endAgain(w)
	switch {
	case r.Seq == 1 && r.Prev == "":
		c.gaps(w)
		find(Restarted, "the writer began anew; its earlier chain ended with record %d", w.Last)
		w.runs, w.late, w.First = nil, nil, 1
		w.add(1, digest, number)
	case known == 0:
		if w.late == nil {
			w.late = map[uint64]uint64{}
		}
		w.late[r.Seq] = short(digest)
		find(Reordered, "it comes after record %d", w.Last)
	default:
		find(Forked, "another record with this number is there, too: the writer lost its own (a power cut), or somebody wrote in its place")
	}
}

// repeat takes a record that came before, just so. A writer that was killed before it knew that its newest records had
// arrived sends them again, up to the newest and in order, perhaps in more than one try.
func (c *ChainCheck) repeat(w *writer, seq, number uint64) {
	if w.again != 0 && seq > w.again+1 {
		c.endAgain(w)
	}
	if w.again == 0 {
		w.from, w.at = seq, number
	}
	w.from, w.again = min(w.from, seq), seq
	if seq == w.Last {
		c.find(Finding{SentAgain, w.Writer, w.from, w.again, w.at, "the same once more, up to the newest: the writer was not sure that they had arrived"})
		w.again = 0
	}
}

// endAgain says what came once more and did not go on to the newest record.
func (c *ChainCheck) endAgain(w *writer) {
	if w.again != 0 {
		c.find(Finding{Duplicated, w.Writer, w.from, w.again, w.at, "the same is there twice"})
		w.again = 0
	}
}

// gaps says which records of a chain never came.
func (c *ChainCheck) gaps(w *writer) {
	missing := func(from, to uint64) {
		if from <= to {
			c.find(Finding{Missing, w.Writer, from, to, 0, "they are between others, and are not there"})
		}
	}
	late := slices.Sorted(maps.Keys(w.late))
	for i := 1; i < len(w.runs); i++ {
		from, to := w.runs[i-1].first+uint64(len(w.runs[i-1].digests)), w.runs[i].first-1
		for ; len(late) > 0 && late[0] <= to; late = late[1:] {
			if late[0] >= from {
				missing(from, late[0]-1)
				from = late[0] + 1
			}
		}
		missing(from, to)
	}
}

func (c *ChainCheck) find(f Finding) {
	if len(c.findings) < maxFindings {
		c.findings = append(c.findings, f)
	} else if f.Kind.Fault() {
		c.More++
	}
}

// End says what was found, in the order in which it showed, and sums up the chains, by writer. last is the number of the
// newest record that the stream is said to have.
func (c *ChainCheck) End(last uint64) ([]Finding, []Chain) {
	if c.writers == nil {
		c.next = c.First
	}
	if last >= c.next && last >= c.First {
		c.find(Finding{Missing, "", c.next, last, last, "the stream is said to have them, and they did not come"})
	}
	var chains []Chain
	for _, name := range slices.Sorted(maps.Keys(c.writers)) {
		w := c.writers[name]
		c.endAgain(w)
		c.gaps(w)
		chains = append(chains, w.Chain)
	}
	for _, who := range slices.Sorted(maps.Keys(c.Seen)) {
		if s := c.Seen[who]; s.Number < c.First {
			delete(c.Seen, who)
		} else {
			c.find(Finding{Gone, who, s.Seq, s.Seq, s.Number, "it was there when the record was verified before: the end of the chain was cut off, or is another one"})
		}
	}
	return c.findings, chains
}

// short is the beginning of a digest, enough to tell a repetition from another record. It is never 0.
func short(digest string) uint64 {
	b, err := hex.DecodeString(digest[:16])
	if err != nil {
		return 1
	}
	return max(1, binary.BigEndian.Uint64(b))
}
