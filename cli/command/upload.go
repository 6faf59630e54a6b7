package command

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/transfer"
)

// uploadedFile is what became of a file on a node, in --json.
type uploadedFile struct {
	Event  string         `json:"event"` // file
	Node   string         `json:"node"`
	Path   string         `json:"path"`
	State  transfer.State `json:"state"`
	Size   int64          `json:"size"`
	SHA256 string         `json:"sha256"`
	Reason string         `json:"reason"`
}

// uploadEnd ends what there is to say of a node, in --json.
type uploadEnd struct {
	Event     string `json:"event"` // end
	Node      string `json:"node"`
	To        string `json:"to"`
	Result    string `json:"result"`
	Written   int    `json:"written"`
	Unchanged int    `json:"unchanged"`
	Refused   int    `json:"refused"`
	Bytes     int64  `json:"bytes"`
	Reason    string `json:"reason"`
}

type uploadOptions struct {
	targets     []string
	files       string
	to          string
	concurrency int
}

// uploads is where files go unless somebody says otherwise: every node takes them there.
const uploads = "/root/uploads"

func (a *app) uploadCommand() *cobra.Command {
	var o uploadOptions
	c := &cobra.Command{
		Use:                   "upload [flags] FILE... --target SELECTOR",
		DisableFlagsInUseLine: true,
		Short:                 "Copy files and folders to nodes, through their agents",
		Long: `Copy files and folders into a folder of nodes, by default ` + uploads + `. A node takes them in the folders that its
policy names (docs/policy.md), as root's own.

Each file appears on the node whole, after its SHA-256 was found to be right there, or not at all. What the node has already
is not sent. An upload that broke off goes on where it was when the command is run again within a day. Permissions are
kept, but for those of others to write. Links in folders are skipped.`,
		Example: `  nix-infra upload dump.sql --target db1
  nix-infra upload site/ certs/ --target @web --remote-path /var/lib/site
  nix-infra upload --target="node001 node002" --file="a.tar b.tar" --remote-path=/root/uploads`,
		RunE: func(c *cobra.Command, args []string) error { return a.upload(c.Context(), args, &o) },
	}
	f := c.Flags()
	f.StringArrayVar(&o.targets, "target", nil, "`nodes` that get them, as a selector; repeatable")
	f.StringVar(&o.files, "file", "", "files and folders, with spaces between them: another way to name them")
	f.StringVar(&o.to, "remote-path", uploads, "`folder` on the nodes; it is made where it is not there")
	f.IntVar(&o.concurrency, "concurrency", 8, "upload to so many nodes at the same time")
	return c
}

func (a *app) upload(ctx context.Context, paths []string, o *uploadOptions) error {
	paths = append(paths, strings.Fields(o.files)...)
	if len(paths) == 0 {
		return errors.New("upload what? Name files or folders (nix-infra upload dump.sql --target db1)")
	}
	if err := someNodes("upload to which nodes?", "upload FILE --target")(nil, o.targets); err != nil {
		return err
	}
	if o.concurrency < 1 {
		return fmt.Errorf("--concurrency %d: use 1 or more", o.concurrency)
	}
	if err := checkFolder(o.to); err != nil {
		return err
	}
	files, err := gather(ctx, paths, func(path, why string) { a.note("%s is skipped: %s", ui.Clean(path), why) })
	if err != nil {
		return err
	}
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	nodes, err := a.selected(ctx, s.Client, o.targets)
	if err != nil {
		return err
	}
	u := &uploading{app: a, session: s, to: o.to, files: files, bytes: bytesOf(files)}
	return u.run(ctx, nodes, o.concurrency)
}

// uploading is files on their way to nodes.
type uploading struct {
	*app
	session *session
	to      string
	files   []*localFile
	bytes   int64
	live    *ui.Live // nil with --json

	mu    sync.Mutex
	nodes []*nodeUpload
}

// nodeUpload is how far one node is.
type nodeUpload struct {
	uploadEnd
	u       *uploading
	has     int64 // bytes that the node has, as far as they count
	refused []error
	err     error // why it broke off, or never began
}

func (u *uploading) run(ctx context.Context, nodes []protocol.NodeState, concurrency int) error {
	if !u.json {
		u.live = u.out.Live(fmt.Sprintf("%s, %s, to %s", plural(len(u.files), "file"), size(u.bytes), u.to))
		defer u.live.Close()
	}
	var all errgroup.Group
	all.SetLimit(concurrency)
	for i := range nodes {
		n := &nodeUpload{uploadEnd: uploadEnd{Event: "end", Node: nodes[i].Name, To: u.to}, u: u}
		u.nodes = append(u.nodes, n)
		all.Go(func() error {
			n.err = n.send(ctx, &nodes[i])
			n.end(ctx)
			return nil
		})
	}
	_ = all.Wait() // each node has its own
	if u.live != nil {
		u.live.Close()
	}
	return u.outcome(ctx)
}

func (n *nodeUpload) send(ctx context.Context, node *protocol.NodeState) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	session := n.u.session
	c, _, err := session.Tunnel(ctx, &node.NodeRecord, session.me.verifier, protocol.TunnelUpload)
	if err != nil {
		return err
	}
	files := make([]transfer.Source, len(n.u.files))
	for i, f := range n.u.files {
		files[i] = f.source(ctx)
	}
	if err := transfer.Send(ctx, c, n.u.to, files, transfer.Watcher{Has: n.had, Again: func(bytes int64) { n.had(-bytes) }, Done: n.done}); err != nil {
		giveUp(c) // what it has, it keeps
		return err
	}
	return c.Close()
}

// had counts bytes that the node has.
func (n *nodeUpload) had(bytes int64) {
	n.u.mu.Lock()
	defer n.u.mu.Unlock()
	n.has += bytes
	if n.u.live != nil && n.u.out.Interactive() {
		n.u.live.Set(n.Node, fmt.Sprintf("%s %s of %s, %d of %s", bar(int(n.has>>10), max(1, int(n.u.bytes>>10))), size(n.has), size(n.u.bytes),
			n.Written+n.Unchanged+n.Refused, plural(len(n.u.files), "file")), ui.Active)
	}
}

// done is told what became of a file.
func (n *nodeUpload) done(f transfer.File, s transfer.State, reason error) {
	n.u.mu.Lock()
	defer n.u.mu.Unlock()
	d := uploadedFile{Event: "file", Node: n.Node, Path: f.Path, State: s, Size: f.Size, SHA256: f.SHA256}
	switch s {
	case transfer.Written:
		n.Written++
		n.Bytes += f.Size
	case transfer.Unchanged:
		n.Unchanged++
	case transfer.Refused:
		n.Refused++
		n.refused = append(n.refused, reason)
		d.Reason = ui.Clean(reason.Error())
	}
	if n.u.json {
		n.u.document(d)
	}
}

// end tells how it ended on a node.
func (n *nodeUpload) end(ctx context.Context) {
	var refusal *protocol.Refusal
	status, kind := "", ui.Bad
	switch {
	case n.err == nil && n.Refused == 0:
		n.Result, kind = "success", ui.Good
		status = fmt.Sprintf("%s written, %d unchanged", plural(n.Written, "file"), n.Unchanged)
	case n.err == nil:
		n.Result, n.Reason = "failed", fmt.Sprintf("%s refused", plural(n.Refused, "file"))
	case ctx.Err() != nil:
		n.Result, n.Reason = "interrupted", "run it again and it goes on from here"
	case errors.Is(n.err, client.ErrNoAnswer):
		n.Result, n.Reason = "no-answer", n.err.Error()
	case errors.As(n.err, &refusal) && refusal.Code != protocol.Failed && n.Written == 0:
		n.Result, n.Reason = "refused", n.err.Error()
	default:
		n.Result, n.Reason = "failed", n.err.Error()
	}
	n.Reason = ui.Clean(n.Reason)
	n.u.mu.Lock()
	defer n.u.mu.Unlock()
	if n.u.json {
		n.u.document(n.uploadEnd)
		return
	}
	n.u.live.Set(n.Node, first(status, n.Result+": "+n.Reason), kind)
}

// outcome is how it went, for the exit status.
func (u *uploading) outcome(ctx context.Context) error {
	if ctx.Err() != nil {
		return &outcome{Interrupted, errors.New("interrupted; every file on the nodes is whole, and running it again goes on from here")}
	}
	results := map[string]int{}
	var errs []error
	var silent []string
	for _, n := range u.nodes {
		results[n.Result]++
		switch {
		case n.Result == "no-answer":
			silent = append(silent, n.Node)
		case n.err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", n.Node, n.err))
		case n.Refused > 1:
			errs = append(errs, fmt.Errorf("%s: %w, and %d more", n.Node, n.refused[0], n.Refused-1))
		case n.Refused > 0:
			errs = append(errs, fmt.Errorf("%s: %w", n.Node, n.refused[0]))
		}
	}
	if len(silent) > 0 {
		errs = append(errs, errors.New("no answer from "+some(silent)))
	}
	status := SomeFailed
	switch {
	case len(errs) == 0:
		return nil
	case results["failed"] > 0:
	case results["refused"] > 0 && results["success"] == 0:
		status = Refused
	case results["refused"] == 0:
		status = Unanswered
	}
	if len(errs) == 1 {
		return &outcome{status, errs[0]}
	}
	return &outcome{status, &errorList{"not all nodes have it:", errs}}
}
