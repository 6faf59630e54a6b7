package command

import (
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// fileDocument is a file, or a name in a folder, in `files --json`.
type fileDocument struct {
	Node string `json:"node"`
	protocol.FileInfo
	Offset *int64 `json:"offset,omitempty"`
	Data   []byte `json:"data,omitempty"`
}

func (a *app) filesCommand() *cobra.Command {
	var o asking
	query := protocol.FilesQuery{}
	c := &cobra.Command{
		Use:   "files PATH [SELECTOR]...",
		Short: "Read a file of nodes, or list a folder",
		Long: `Read a file of nodes (all, if none is selected), or list a folder. What can be read is what each node lets be read:
what everybody on it may read below /etc/nixos, /etc/systemd and /var/log, without the journal (see logs), and
whatever its configuration adds (docs/policy.md).

On a terminal, and where the node is named in front of each line, text is cleaned of control characters; else a file
of one node is written as it is.`,
		Example: `  nix-infra files /etc/nixos web1
  nix-infra files /etc/nixos/flake.nix web1
  nix-infra files /var/log/app/error.log @web --offset 524288
  nix-infra files /etc/nixos/flake.lock all --json`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return fmt.Errorf("which file? Name it (nix-infra files /etc/nixos web1)")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			query.Path = args[0]
			if len(query.Path) > 1 {
				query.Path = strings.TrimSuffix(query.Path, "/")
			}
			if err := query.Validate(); err != nil {
				return err
			}
			q, err := a.question(c.Context(), args[1:], o)
			if err != nil {
				return err
			}
			defer q.session.Close()
			return put(c.Context(), q, protocol.ReadFiles, query, func(node string, _ int, answer protocol.FileAnswer) {
				if answer.Kind == "folder" {
					q.showFolder(node, &answer)
				} else {
					q.showFile(node, &answer, query.Limit)
				}
			})
		},
	}
	f := c.Flags()
	f.Int64Var(&query.Offset, "offset", 0, "begin at this byte of the file")
	f.Int64Var(&query.Limit, "limit", 0, "read so many bytes of the file; 0: as many as an answer carries")
	f.StringVar(&query.After, "after", "", "list only names after this one")
	o.flags(c)
	return c
}

func (q *question) showFolder(node string, answer *protocol.FileAnswer) {
	var rows [][]ui.Cell
	for _, e := range answer.Entries {
		if q.json {
			q.document(fileDocument{Node: node, FileInfo: e})
			continue
		}
		name := e.Name
		switch e.Kind {
		case "folder":
			name += "/"
		case "link":
			name += " -> " + e.Target
		}
		rows = append(rows, ui.Text(e.Kind, fs.FileMode(e.Mode & 0o777).String()[1:], fmt.Sprint(e.Size), e.Modified.Local().Format(time.DateTime), name))
	}
	q.print(node, q.columns(rows)...)
	if answer.Next != "" {
		q.cut(node, "there are more names; see them with --after "+answer.Next, answer.Next)
	}
}

func (q *question) showFile(node string, answer *protocol.FileAnswer, limit int64) {
	switch {
	case q.json:
		q.document(fileDocument{node, answer.FileInfo, &answer.Offset, answer.Data})
	case q.named || q.out.Interactive():
		var lines []string
		for l := range strings.Lines(string(answer.Data)) {
			lines = append(lines, ui.Clean(strings.ReplaceAll(strings.TrimSuffix(l, "\n"), "\t", "        ")))
		}
		q.print(node, lines...)
	default:
		q.Stdout.Write(answer.Data)
	}
	end := answer.Offset + int64(len(answer.Data))
	if left := answer.Size - end; left > 0 && (limit == 0 || int64(len(answer.Data)) < limit) {
		q.cut(node, fmt.Sprintf("%s of %s follow; see them with --offset %d", size(left), size(answer.Size), end), fmt.Sprint(end))
	}
}
