package protocol

import (
	"bytes"
	"fmt"
	"strings"
	"time"
)

// The record on its way. A node sends its records many to a message, since each message costs the node, the broker and
// the stream more than the records in it.

// Bounds of a message with records: how many there are in it, and their bytes. The stream itself takes twice as many bytes.
const (
	MaxAuditRecords = 256
	MaxAuditBytes   = 32 << 10
)

// JoinRecords makes one message of encoded records: a line each, as an encoded record is one.
func JoinRecords(records [][]byte) []byte { return bytes.Join(records, []byte("\n")) }

// SplitRecords gives the records of a message as their writer encoded them. What is no record stays among them: of more
// than MaxAuditRecords lines, too, the last ones are one thing that is none.
func SplitRecords(message []byte) [][]byte {
	return bytes.SplitN(message, []byte("\n"), MaxAuditRecords)
}

// Reading the record. The stream numbers the messages of all writers, in the order in which it got them: that order, and
// those numbers, are the broker's word. What a writer's chain holds together is AuditRecord.Seq and Prev.

// AuditQuery is ShowAudit's: the records of the messages from number From (at least 1) up to, and without, To (0: to the end). From 0
// asks only where the record begins and ends. The other fields choose among them, each where it is not empty.
type AuditQuery struct {
	From   uint64    `json:"from"`
	To     uint64    `json:"to,omitempty"`
	Since  time.Time `json:"since,omitzero"` // by the records' own times
	Until  time.Time `json:"until,omitzero"`
	User   string    `json:"user,omitempty"`
	At     string    `json:"at,omitempty"` // node or controller that wrote it
	Action Action    `json:"action,omitempty"`
	Denied bool      `json:"denied,omitempty"` // only what was refused or failed
}

// Validate checks the query's form.
func (q *AuditQuery) Validate() error {
	if q.At != "" {
		if err := CheckName(q.At); err != nil { // it becomes part of a subject
			return err
		}
	}
	if q.To != 0 && q.To < q.From {
		return fmt.Errorf("records from %d to %d are none", q.From, q.To)
	}
	return nil
}

// Matches tells whether a record is one that the query asks for.
func (q *AuditQuery) Matches(r *AuditRecord) bool {
	return (q.User == "" || r.User == q.User) && (q.Action == "" || r.Action == q.Action) && (q.At == "" || r.At == q.At) &&
		(!q.Denied || r.Outcome != "" && r.Outcome != "ok") &&
		(q.Since.IsZero() || !r.Time.Before(q.Since)) && (q.Until.IsZero() || r.Time.Before(q.Until))
}

// AuditPage answers ShowAudit with as many records as fit.
type AuditPage struct {
	First   uint64         `json:"first"` // the number of the oldest message that is kept
	Last    uint64         `json:"last"`  // and of the newest; below First where there is none
	Records []StoredRecord `json:"records,omitempty"`
	Next    uint64         `json:"next,omitempty"` // the number to go on from; 0: that was all that was asked for
	Since   time.Time      `json:"since,omitzero"` // when the stream got the first message that was looked at
}

// StoredRecord is a record as the stream has it: the bytes that its writer sent, whose digest the next one names.
type StoredRecord struct {
	Number  uint64    `json:"number"`  // of the message that brought it
	Subject string    `json:"subject"` // tells who wrote it, as the broker enforced it
	Stored  time.Time `json:"stored"`
	Data    []byte    `json:"data"` // an AuditRecord, unless somebody damaged it
}

// AuditWriter tells from its subject who wrote a record: a node's or a controller's name, and in words who that is. The
// two may have the same name.
func AuditWriter(subject string) (name, writer string, ok bool) {
	if name, what, ok := UpSender(subject); ok && what == UpAudit {
		return name, "node " + name, true
	}
	t := strings.Split(subject, ".")
	if len(t) == 5 && t[0] == "ni" && t[2] == "controller" && t[4] == "audit" && CheckName(t[3]) == nil {
		return t[3], "controller " + t[3], true
	}
	return "", "", false
}
