package command

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// auditDocument is a record in `audit --json`.
type auditDocument struct {
	Number  uint64          `json:"number"`
	Writer  string          `json:"writer"`
	Seq     uint64          `json:"seq"`
	Time    time.Time       `json:"time"`
	Stored  time.Time       `json:"stored"`
	User    string          `json:"user"`
	Role    protocol.Role   `json:"role"`
	Request string          `json:"request"`
	Action  protocol.Action `json:"action"`
	Target  string          `json:"target"`
	Payload string          `json:"payload"`
	Detail  string          `json:"detail"`
	Outcome string          `json:"outcome"`
	Reason  string          `json:"reason"`
}

type auditOptions struct {
	since, until, user, node, action string
	denied                           bool
	limit                            int
}

func (a *app) auditCommand() *cobra.Command {
	var o auditOptions
	c := &cobra.Command{
		Use:   "audit",
		Short: "Read the record of who ordered what, and what came of it",
		Long: `Read the record of who ordered what, and what came of it: the newest records, the oldest of them first. A request is
on record twice, when it begins and with its outcome, by whom it was asked of: a node or a controller.

Reading it needs an admin, since it tells what everybody did. It says what the controller's stream has; audit verify
finds out whether that is all, and as it was written.`,
		Example: `  nix-infra audit --since 2h
  nix-infra audit --user bob --denied
  nix-infra audit --action exec --since 1d
  nix-infra audit --node web1 --action deploy --since 2026-11-01 --until 2026-11-08 --limit 0 --json`,
		Args: unknownSubcommand,
		RunE: func(c *cobra.Command, _ []string) error { return a.audit(c.Context(), o) },
	}
	f := c.Flags()
	f.StringVar(&o.since, "since", "", "not before: so long ago, such as 2h or 7d, or a time such as 2026-11-01 or 2026-11-01T08:00:00Z")
	f.StringVar(&o.until, "until", "", "before: in the same forms")
	f.StringVar(&o.user, "user", "", "only what this user asked for")
	f.StringVar(&o.node, "node", "", "only what this node or controller wrote")
	f.StringVar(&o.action, "action", "", "only this action, such as deploy or ping")
	f.BoolVar(&o.denied, "denied", false, "only what was refused or failed")
	f.IntVar(&o.limit, "limit", 100, "at most so many, 0 for all")
	c.AddCommand(a.auditVerifyCommand())
	return c
}

func (o auditOptions) query(now time.Time) (q protocol.AuditQuery, err error) {
	q = protocol.AuditQuery{User: o.user, At: o.node, Action: protocol.Action(o.action), Denied: o.denied}
	if o.since != "" {
		if q.Since, err = moment(o.since, now); err != nil {
			return q, fmt.Errorf("--since: %w", err)
		}
	}
	if o.until != "" {
		if q.Until, err = moment(o.until, now); err != nil {
			return q, fmt.Errorf("--until: %w", err)
		}
	}
	if err := q.Validate(); err != nil {
		return q, fmt.Errorf("--node: %w", err)
	}
	if o.limit < 0 {
		return q, fmt.Errorf("--limit %d: use 0 or more", o.limit)
	}
	return q, nil
}

func (a *app) audit(ctx context.Context, o auditOptions) error {
	q, err := o.query(time.Now())
	if err != nil {
		return err
	}
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	records, err := s.Audit(ctx, q, o.limit)
	if err != nil {
		return err
	}
	var rows [][]ui.Cell
	for _, r := range records {
		d := documentOfRecord(r)
		if a.json {
			a.document(d)
			continue
		}
		who := d.User
		if d.Role != "" {
			who += " (" + string(d.Role) + ")"
		}
		row := ui.Text(d.Time.Local().Format(time.DateTime), d.Writer, who, string(d.Action), d.Target, d.Detail, first(d.Outcome, "begins"), d.Reason)
		switch outcome := &row[6]; d.Outcome {
		case "":
			outcome.Colour = ui.Dim
		case "ok":
		default:
			outcome.Colour = ui.Red
		}
		rows = append(rows, row)
	}
	if !a.json {
		a.out.Table([]string{"TIME", "WRITTEN BY", "USER", "ACTION", "TARGET", "DETAIL", "OUTCOME", "REASON"}, rows)
	}
	return nil
}

func documentOfRecord(s protocol.StoredRecord) auditDocument {
	_, writer, _ := protocol.AuditWriter(s.Subject)
	d := auditDocument{Number: s.Number, Writer: writer, Stored: s.Stored, Time: s.Stored}
	r, err := protocol.Decode[protocol.AuditRecord](s.Data)
	if err != nil {
		d.Outcome, d.Reason = "damaged", "this is no record; see nix-infra audit verify"
		return d
	}
	d.Seq, d.Time, d.User, d.Role, d.Request, d.Action = r.Seq, r.Time, r.User, r.Role, r.Request, r.Action
	d.Target, d.Payload, d.Detail, d.Outcome, d.Reason = r.Target, r.Payload, r.Detail, r.Outcome, r.Reason
	return d
}

// findingDocument is something that `audit verify --json` found.
type findingDocument struct {
	Event  string             `json:"event"` // finding
	Kind   client.FindingKind `json:"kind"`
	Fault  bool               `json:"fault"`
	Writer string             `json:"writer"`
	From   uint64             `json:"from"`
	To     uint64             `json:"to"`
	Number uint64             `json:"number"`
	Reason string             `json:"reason"`
}

// chainDocument is a writer's chain in `audit verify --json`.
type chainDocument struct {
	Event   string `json:"event"` // chain
	Writer  string `json:"writer"`
	Records int    `json:"records"`
	First   uint64 `json:"first"`
	Last    uint64 `json:"last"`
	Head    string `json:"head"`
}

// verifiedDocument is the end of `audit verify --json`.
type verifiedDocument struct {
	Event   string `json:"event"` // verified
	Records int    `json:"records"`
	Writers int    `json:"writers"`
	Faults  int    `json:"faults"`
}

func (a *app) auditVerifyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "verify",
		Short: "Check that nobody changed the record",
		Long: `Check that nobody changed the record. Each node and controller numbers its records, and each record names the digest
of the one before it. All that the stream has is read and checked here, without trust in the controller or the broker: a
record that was removed, changed, put elsewhere or repeated is named, and the exit status is 1.

Not a fault: the oldest records go when the stream is full, a machine that was set up anew begins another chain, and one
that was killed may send its newest records again. How far each chain went is kept in nix-infra/audit.json, so that the
next run finds out if it was cut off since. What was cut off before anybody verified it can't be seen from here: a chain's
last number and digest are printed, to be compared with what the machine itself has (on a node: journalctl
NIX_INFRA_AUDIT=NUMBER).`,
		Example: `  nix-infra audit verify
  nix-infra audit verify --json | jq 'select(.fault)'`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.auditVerify(c.Context()) },
	}
}

func (a *app) auditVerify(ctx context.Context) error {
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	before, err := a.readSeen()
	if err != nil {
		return err
	}
	check := &client.ChainCheck{Seen: before.Seen}
	records, last, err := s.VerifyAudit(ctx, check)
	if err != nil {
		return err
	}
	findings, chains := check.End(last)
	faults := check.More
	for _, f := range findings {
		if f.Kind.Fault() {
			faults++
		}
		if a.json {
			a.document(findingDocument{"finding", f.Kind, f.Kind.Fault(), f.Writer, f.From, f.To, f.Number, f.Reason})
			continue
		}
		colour := ui.Dim
		if f.Kind.Fault() {
			colour = ui.Red
		}
		where := first(f.Writer, "the stream itself")
		if f.From != 0 {
			where += ", record " + span(f.From, f.To)
		}
		a.out.Printf("%s  %s: %s\n", a.out.Paint(colour, string(f.Kind)), ui.Clean(where), ui.Clean(f.Reason))
	}
	var rows [][]ui.Cell
	for _, c := range chains {
		if a.json {
			a.document(chainDocument{"chain", c.Writer, c.Records, c.First, c.Last, c.Head})
		}
		rows = append(rows, ui.Text(c.Writer, strconv.Itoa(c.Records), span(c.First, c.Last), c.Head))
	}
	if a.json {
		a.document(verifiedDocument{"verified", records, len(chains), faults})
	} else {
		a.out.Table([]string{"WRITER", "RECORDS", "NUMBERS", "LAST DIGEST"}, rows)
	}
	if err := a.keepSeen(check, chains); err != nil {
		a.note("how far the record went is not kept, and the next run can't tell if it was cut off: %v", err)
	}
	if faults > 0 {
		return &outcome{SomeFailed, fmt.Errorf("the record was changed or is not whole: %s in %s", plural(faults, "fault"), plural(records, "record"))}
	}
	a.say("%s of %s: nothing was changed, removed or repeated\n", plural(records, "record"), plural(len(chains), "writer"))
	return nil
}

// seenFile, beside fleet.json, is how far the writers' chains went when they were verified last.
const seenFile = "audit.json"

type seenRecord struct {
	Version int                    `json:"v"`
	Seen    map[string]client.Seen `json:"seen"` // by writer, such as "node web1"
}

func (a *app) readSeen() (*seenRecord, error) {
	r := &seenRecord{Version: protocol.Version}
	return r, a.readRecord(seenFile, r, &r.Version)
}

// keepSeen keeps how far the chains went. What is gone stays, so that each run says so; what the stream's retention has let
// go of does not.
func (a *app) keepSeen(check *client.ChainCheck, chains []client.Chain) error {
	return a.alone(func() error {
		r, err := a.readSeen()
		if err != nil {
			return err
		}
		maps.DeleteFunc(r.Seen, func(_ string, s client.Seen) bool { return s.Number < check.First })
		if r.Seen == nil {
			r.Seen = map[string]client.Seen{}
		}
		for _, c := range chains {
			if _, gone := check.Seen[c.Writer]; !gone && c.Last > 0 && c.Number >= r.Seen[c.Writer].Number {
				r.Seen[c.Writer] = client.Seen{Seq: c.Last, Digest: c.Head, Number: c.Number}
			}
		}
		return a.writeRecord(seenFile, r)
	})
}

// span is numbers from one to another.
func span(from, to uint64) string {
	if from == to {
		return strconv.FormatUint(from, 10)
	}
	return strings.Join([]string{strconv.FormatUint(from, 10), strconv.FormatUint(to, 10)}, "–")
}
