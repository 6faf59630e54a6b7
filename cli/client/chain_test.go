package client

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

// written is a writer's chain of so many records.
func written(name string, from, count int, user string) []protocol.StoredRecord {
	prev := ""
	if from > 1 {
		prev = protocol.Digest([]byte("the one before"))
	}
	var all []protocol.StoredRecord
	for i := range count {
		r := protocol.AuditRecord{Version: 1, Seq: uint64(from + i), Prev: prev, At: name, User: user}
		data := protocol.Encode(r)
		prev = protocol.Digest(data)
		all = append(all, protocol.StoredRecord{Subject: protocol.UpSubject(name, protocol.UpAudit), Data: data})
	}
	return all
}

// stored numbers records as a stream does.
func stored(first uint64, records []protocol.StoredRecord) []protocol.StoredRecord {
	records = slices.Clone(records)
	for i := range records {
		records[i].Number = first + uint64(i)
	}
	return records
}

func altered(r protocol.StoredRecord) protocol.StoredRecord {
	r.Data = []byte(strings.Replace(string(r.Data), `"bob"`, `"eve"`, 1))
	return r
}

func TestChainCheck(t *testing.T) {
	a, b := written("web1", 1, 9, "bob"), written("web2", 1, 3, "bob")
	pick := func(order ...int) []protocol.StoredRecord {
		var some []protocol.StoredRecord
		for _, i := range order {
			some = append(some, a[i-1])
		}
		return some
	}
	with := func(change func(r []protocol.StoredRecord)) []protocol.StoredRecord {
		r := slices.Clone(a)
		change(r)
		return r
	}
	ctl := written("web1", 1, 2, "bob") // a controller of the same name keeps its own chain
	for i := range ctl {
		ctl[i].Subject = protocol.ControllerAudit("web1")
	}
	for _, c := range []struct {
		name    string
		first   uint64
		records []protocol.StoredRecord
		want    []string // kind writer from-to
	}{
		{"whole", 1, a, nil},
		{"nothing", 1, nil, nil},
		{"writers mixed", 1, slices.Concat(a[:4], b[:2], ctl, a[4:], b[2:]), nil},
		{"one removed", 1, pick(1, 2, 4, 5), []string{"missing node web1 3-3"}},
		{"many removed", 1, pick(1, 2, 6, 8, 9), []string{"missing node web1 3-5", "missing node web1 7-7"}},
		{"the first removed", 1, pick(2, 3), []string{"missing node web1 1-1"}},
		{"changed", 1, with(func(r []protocol.StoredRecord) { r[4] = altered(r[4]) }), []string{"changed node web1 5-5"}},
		{"two changed", 1, with(func(r []protocol.StoredRecord) { r[1], r[6] = altered(r[1]), altered(r[6]) }), []string{"changed node web1 2-2", "changed node web1 7-7"}},
		{"changed and put at the end", 1, append(pick(1, 2, 4), altered(a[2])), []string{"reordered node web1 3-3"}},
		{"reordered", 1, pick(1, 3, 2, 4, 5), []string{"reordered node web1 2-2"}},
		{"reversed", 1, pick(3, 2, 1), []string{"missing node web1 1-2", "reordered node web1 2-2", "restarted node web1 1-1"}},
		{"one twice", 1, pick(1, 2, 3, 4, 2, 5), []string{"duplicated node web1 2-2"}},
		{"some twice", 1, pick(1, 2, 3, 4, 5, 2, 3, 6), []string{"duplicated node web1 2-3"}},
		{"twice at the end of the record", 1, pick(1, 2, 3, 4, 2), []string{"duplicated node web1 2-2"}},
		{"sent again after a crash", 1, pick(1, 2, 3, 4, 3, 4, 5), []string{"sent-again node web1 3-4"}},
		{"sent again, and again", 1, pick(1, 2, 3, 4, 5, 3, 4, 3, 4, 5, 6), []string{"sent-again node web1 3-5"}},
		{"another in its place", 1, append(pick(1, 2, 3), altered(a[1])), []string{"forked node web1 2-2"}},
		{"set up anew", 1, append(pick(1, 2, 3), written("web1", 1, 2, "carol")...), []string{"restarted node web1 1-1"}},
		{"set up anew, with a gap before", 1, append(pick(1, 3), written("web1", 1, 2, "carol")...), []string{"missing node web1 2-2", "restarted node web1 1-1"}},
		{"cut by retention", 40, pick(4, 5, 6), []string{"cut node web1 1-3"}},
		{"cut by retention, and one removed", 40, pick(4, 6), []string{"cut node web1 1-3", "missing node web1 5-5"}},
		{"no record", 1, with(func(r []protocol.StoredRecord) { r[8].Data = []byte("x") }), []string{"damaged node web1 0-0"}},
		{"a number that nobody comes to", 1, append(pick(1), written("web1", maxSeq+1, 1, "bob")...), []string{"damaged node web1 0-0"}},
		{"a huge gap", 1, append(pick(1), written("web1", maxSeq, 1, "bob")...), []string{fmt.Sprintf("missing node web1 2-%d", maxSeq-1)}},
		{"on another's behalf", 1, func() []protocol.StoredRecord {
			r := written("web1", 1, 1, "bob")
			r[0].Subject = protocol.UpSubject("web2", protocol.UpAudit)
			return r
		}(), []string{"foreign node web2 1-1"}},
		{"nobody's", 1, []protocol.StoredRecord{{Subject: "ni.v1.node.web1.up.beat", Data: a[0].Data}}, []string{"foreign  1-1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			check := &ChainCheck{First: c.first}
			records := stored(c.first, c.records)
			for _, r := range records {
				check.Add(r)
			}
			findings, chains := check.End(c.first + uint64(len(records)) - 1)
			var got []string
			for _, f := range findings {
				got = append(got, fmt.Sprintf("%s %s %d-%d", f.Kind, f.Writer, f.From, f.To))
				if f.Reason == "" || f.Kind.Fault() == slices.Contains([]FindingKind{Cut, Restarted, SentAgain}, f.Kind) {
					t.Errorf("finding %+v", f)
				}
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("found %q, want %q", got, c.want)
			}
			count := 0
			for _, chain := range chains {
				count += chain.Records
			}
			if count != len(records) && c.name != "nobody's" {
				t.Errorf("%d records in %+v", count, chains)
			}
		})
	}
	t.Run("the end withheld", func(t *testing.T) {
		check := &ChainCheck{First: 1}
		for _, r := range stored(1, a[:5]) {
			check.Add(r)
		}
		if found, _ := check.End(9); len(found) != 1 || found[0].Kind != Missing || found[0].From != 6 || found[0].To != 9 {
			t.Errorf("found %+v", found)
		}
	})
	t.Run("taken out of the stream", func(t *testing.T) {
		check := &ChainCheck{First: 1}
		for i, r := range stored(1, a) {
			if i != 4 {
				check.Add(r)
			}
		}
		found, _ := check.End(9)
		if len(found) != 2 || found[0].Writer != "" || found[0].From != 5 || found[1].Writer != "node web1" || found[1].From != 5 {
			t.Errorf("found %+v", found)
		}
	})
	t.Run("many to a message", func(t *testing.T) {
		whole, lacks := &ChainCheck{First: 1}, &ChainCheck{First: 1}
		for i, r := range a {
			r.Number = uint64(i/3) + 1
			if whole.Add(r); r.Number != 2 {
				lacks.Add(r)
			}
		}
		if found, chains := whole.End(3); len(found) != 0 || chains[0].Last != 9 {
			t.Errorf("found %+v in %+v", found, chains)
		}
		found, _ := lacks.End(3)
		if len(found) != 2 || found[0].Writer != "" || found[0].From != 2 || found[1].From != 4 || found[1].To != 6 {
			t.Errorf("found %+v", found)
		}
	})
	t.Run("what was seen before", func(t *testing.T) {
		last := Seen{Seq: 9, Digest: protocol.Digest(a[8].Data), Number: 9}
		other := written("web1", 1, 9, "eve")
		for _, c := range []struct {
			name    string
			first   uint64
			records []protocol.StoredRecord
			gone    bool
		}{
			{"is there", 1, a, false},
			{"is there, and more", 1, written("web1", 1, 12, "bob"), false},
			{"was cut off", 1, a[:8], true},
			{"was cut off, and others came", 1, append(slices.Clone(a[:8]), other[8]), true},
			{"is another record", 1, other, true},
			{"is not there, nor anything", 1, nil, true},
			{"is gone by retention", 10, written("web1", 10, 3, "bob"), false},
			{"is gone by retention, as all", 10, nil, false},
		} {
			check := &ChainCheck{First: c.first, Seen: map[string]Seen{"node web1": last}}
			records := stored(c.first, c.records)
			for _, r := range records {
				check.Add(r)
			}
			findings, _ := check.End(c.first + uint64(len(records)) - 1)
			i := slices.IndexFunc(findings, func(f Finding) bool { return f.Kind == Gone })
			if gone := i >= 0; gone != c.gone || gone && (findings[i].Writer != "node web1" || findings[i].From != 9 || !findings[i].Kind.Fault()) || (len(check.Seen) > 0) != c.gone {
				t.Errorf("what %s: %+v, left is %v", c.name, findings, check.Seen)
			}
		}
	})
	t.Run("a flood", func(t *testing.T) {
		check := &ChainCheck{First: 1}
		for i := range uint64(maxFindings + 7) {
			check.Add(protocol.StoredRecord{Number: i + 1, Subject: a[0].Subject, Data: []byte("x")})
		}
		if found, _ := check.End(maxFindings + 7); len(found) != maxFindings || check.More != 7 {
			t.Errorf("%d found and %d more", len(found), check.More)
		}
	})
}

// Whatever is done to a chain but cutting its end shows.
func FuzzChainCheck(f *testing.F) {
	f.Add([]byte{0, 3, 1, 4})
	f.Fuzz(func(t *testing.T, ops []byte) {
		records := written("web1", 1, 12, "bob")
		whole := slices.Clone(records)
		for i := 0; i+1 < len(ops) && i < 20 && len(records) > 1; i += 2 {
			at := int(ops[i+1]) % (len(records) - 1)
			switch ops[i] % 4 {
			case 0:
				records = slices.Delete(records, at, at+1)
			case 1:
				records[at] = altered(records[at])
			case 2:
				records[at], records[at+1] = records[at+1], records[at]
			case 3:
				records = slices.Insert(records, at, records[at])
			}
		}
		check := &ChainCheck{First: 1}
		for _, r := range stored(1, records) {
			check.Add(r)
		}
		findings, _ := check.End(uint64(len(records)))
		same := slices.EqualFunc(records, whole[:min(len(records), len(whole))], func(a, b protocol.StoredRecord) bool { return string(a.Data) == string(b.Data) })
		if len(findings) == 0 != same {
			t.Errorf("%d findings in a chain that is whole: %v", len(findings), same)
		}
	})
}
