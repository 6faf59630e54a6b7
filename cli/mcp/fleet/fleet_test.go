package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mark3labs/mcp-go/client"
	"github.com/mark3labs/mcp-go/client/transport"
	mcpgo "github.com/mark3labs/mcp-go/mcp"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// largestMessage is what one answer may be over the wire: two halves of a page, and what is around them.
const largestMessage = 80 << 10

// A fleet of a thousand nodes: each answer stays small, says what it left out, and leaves nothing out in the end.
func TestThousandNodes(t *testing.T) {
	const fleetSize = 1000
	var nodes []protocol.NodeState
	stats := make([]answer[protocol.Stats], fleetSize)
	runs := make([]*ran, fleetSize)
	for i := range fleetSize {
		name := fmt.Sprintf("web%04d", i)
		now := time.Now()
		nodes = append(nodes, protocol.NodeState{NodeRecord: protocol.NodeRecord{Name: name, IPv4: "192.0.2.1", Tags: []string{"web"}}, Online: true, LastSeen: &now,
			Beat: &protocol.Beat{Phase: protocol.Confirmed, Deployment: "d1", FailedUnits: []string{"a.service"}}})
		stats[i] = answer[protocol.Stats]{node: name, said: protocol.Stats{Health: &protocol.HealthStats{CPUs: 4, Load: [3]float64{float64(i) / 100, 1, 1}, MemTotal: 8 << 30, MemAvailable: 4 << 30}}}
		runs[i] = &ran{node: name, stdout: []byte(strings.Repeat("a line of some output\n", 20)), ended: &protocol.Ending{Result: protocol.ResultSuccess}}
	}
	stats[7].err = protocol.Refuse(protocol.Failed, "%s", strings.Repeat("a long reason ", 1000))

	s := mcp.New(mcp.Options{Name: "test", Version: "1"})
	mcp.Add(s, mcp.Tool{Name: "stats"}, func(context.Context, *mcp.Call, struct{}) (*mcp.Answer[statsRow], error) {
		return showStats(stats), nil
	})
	mcp.Add(s, mcp.Tool{Name: "run"}, func(context.Context, *mcp.Call, struct{}) (*mcp.Answer[runRow], error) {
		return show(runs, "uptime"), nil
	})
	mcp.Add(s, mcp.Tool{Name: "nodes"}, func(context.Context, *mcp.Call, struct{}) (*mcp.Answer[nodeRow], error) {
		a := &mcp.Answer[nodeRow]{Summary: summaryOf(nodes)}
		for i := range nodes {
			r := rowOf(&nodes[i])
			a.Parts = append(a.Parts, mcp.Part[nodeRow]{Text: r.words(), Untrusted: true, Row: &r})
		}
		return a, nil
	})
	c := connected(t, s)
	for tool, summary := range map[string]string{
		"stats": "999 of 1000 nodes answered. web0007: refused (failed): \"a long reason", "run": "uptime: 1000 of 1000 nodes answered.", "nodes": "1000 nodes: 1000 confirmed. With failed units: web0000, web0001, web0002, web0003, web0004, web0005, web0006, web0007, web0008, web0009, web0010, web0011 and 988 more.",
	} {
		seen, inputs := map[string]bool{}, map[string]any{}
		for page := 0; ; page++ {
			r, err := c.CallTool(t.Context(), mcpgo.CallToolRequest{Params: mcpgo.CallToolParams{Name: tool, Arguments: inputs}})
			if err != nil || r.IsError {
				t.Fatalf("%s: %v, %+v", tool, err, r)
			}
			wire, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			if len(wire) > largestMessage {
				t.Fatalf("%s, page %d: %d bytes", tool, page, len(wire))
			}
			var data struct {
				Summary string
				Results []struct{ Node string }
				LeftOut int `json:"left_out"`
				Next    string
			}
			structured, _ := json.Marshal(r.StructuredContent)
			if err := json.Unmarshal(structured, &data); err != nil {
				t.Fatal(err)
			}
			text := r.Content[0].(mcpgo.TextContent).Text
			if !strings.HasPrefix(text, summary) || data.Summary == "" {
				t.Fatalf("%s does not begin with %q: %.400s", tool, summary, text)
			}
			for _, row := range data.Results {
				seen[row.Node] = true
			}
			if (data.LeftOut > 0) != (data.Next != "") || data.LeftOut > 0 && !strings.Contains(text, fmt.Sprintf("%d of ", data.LeftOut)) {
				t.Fatalf("%s, page %d: %d left out, next %q", tool, page, data.LeftOut, data.Next)
			}
			if data.Next == "" {
				if page == 0 {
					t.Errorf("%s: all fits on a page, so that nothing is seen", tool)
				}
				break
			}
			inputs["cursor"] = data.Next
		}
		if len(seen) != fleetSize {
			t.Errorf("%s: %d of %d nodes were seen", tool, len(seen), fleetSize)
		}
	}
}

func TestFirstFailure(t *testing.T) {
	at := func(minutes float64) time.Time {
		return time.Unix(0, 0).Add(time.Duration(minutes * float64(time.Minute)))
	}
	type line struct {
		minutes float64
		message string
	}
	const started, failed, exited = "Started Web.", "web.service: Failed with result 'exit-code'.", "web.service: Main process exited, code=exited, status=1/FAILURE"
	for name, test := range map[string]struct {
		lines          []line
		healthy, first float64 // -1: none
	}{
		"nothing was said":             {nil, -1, -1},
		"it never failed":              {[]line{{1, started}}, -1, -1},
		"it never ran":                 {[]line{{1, failed}}, -1, 1},
		"once":                         {[]line{{1, started}, {9, exited}, {9, failed}}, 9, 9},
		"a row of restarts":            {[]line{{1, started}, {9, failed}, {9.1, started}, {9.2, failed}, {9.3, started}, {9.4, failed}}, 9, 9},
		"it ran in between":            {[]line{{1, started}, {2, failed}, {3, started}, {9, failed}}, 9, 9},
		"it failed right at the start": {[]line{{1, started}, {1.1, failed}, {1.2, started}, {1.3, failed}}, -1, 1.1},
		"a oneshot":                    {[]line{{1, "Finished Backup."}, {60, "Failed to start Backup."}}, 60, 60},
	} {
		var entries []protocol.JournalEntry
		for _, l := range test.lines {
			entries = append(entries, protocol.JournalEntry{Time: at(l.minutes), Message: l.message})
		}
		healthy, first := firstFailure(entries)
		for what, got := range map[string]struct {
			got  time.Time
			want float64
		}{"healthy": {healthy, test.healthy}, "first": {first, test.first}} {
			want := time.Time{}
			if got.want >= 0 {
				want = at(got.want)
			}
			if !got.got.Equal(want) {
				t.Errorf("%s: %s at %v, not %v", name, what, got.got, want)
			}
		}
	}
}

// Words that are not understood in whole are for the node's own program: nil. A question must not ask for more than they say.
func TestWordsThatAskTyped(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for words, typed := range map[string]bool{
		"": true, "list-units": true, "--failed": true, "--state=failed,active": true, "list-units a.service": true, "-t service -at socket": true, "status a b.timer -n0": true, "status -- a": false,
		"status": false, "status a*": false, "status 17": false, "status /dev/sda": false, "status a -n x": false, "status a -n 501": false, "status --state=failed a": false, "--state": false, "--state=help": false, "-t help": false,
		"show a": false, "is-active a": false, "start a": false, "list-units --user": false, "--fail": false, "--failed=1": false, "-H x": false, "STATUS a": false, "status $(id)": false, "list-units ../x": false,
	} {
		if got := readUnitQuestion(strings.Fields(words)) != nil; got != typed {
			t.Errorf("systemctl %s: a question of the agents %t, not %t", words, got, typed)
		}
	}
	for words, typed := range map[string]bool{
		"": true, "-u a -u b*": true, "-ua": true, "-b": true, "-b -1": true, "-b0 -n": true, "-n 5 -r": true, "-rn5": true, "--lines=5 --boot=-1": true, "--boot -1": false, "-p 3": true, "-p warning": true, "-S -1h": true, "-S now": true, "-o short": true,
		"-p 8": false, "-p err..info": false, "-k": false, "-f": false, "-e": false, "-n all": false, "-n +5": false, "-n 5001": false, "-S yesterday": false, "-S 2026-01-31": false, "-S 1h": false, "-S": false, "-o json": false, "_PID=1": false, "-u ../a": false,
		"--rotate": false, "--unit": false, "--un=a": false, "-M x": false, "-D/root": false, "-b x": false, "--user": false, "-m": false, "-xn5": false,
	} {
		if got := readJournalQuestion(strings.Fields(words), now) != nil; got != typed {
			t.Errorf("journalctl %s: a question of the agents %t, not %t", words, got, typed)
		}
	}
	for text, ago := range map[string]time.Duration{"1 hour ago": time.Hour, "-90s": 90 * time.Second, "2days ago": 48 * time.Hour, "-3 weeks": 21 * 24 * time.Hour, "now": 0, "@1799999000": 1000 * time.Second, "2027-01-15T08:00:00Z": 0} {
		if got, ok := instant(text, now); !ok || got != now.Add(-ago).UnixMicro() {
			t.Errorf("%s is %v before, not %v: %t", text, now.Sub(time.UnixMicro(got)), ago, ok)
		}
	}
	for _, text := range []string{"", "1 hour", "-1 hour ago", "tomorrow", "1 month ago", "@", "@-1x", "2027-01-15 08:00:00", "9999999 s ago"} {
		if got, ok := instant(text, now); ok {
			t.Errorf("%q was read as %v", text, time.UnixMicro(got))
		}
	}
}

func TestNewestEntries(t *testing.T) {
	entries := make([]protocol.JournalEntry, 10)
	for i := range entries {
		entries[i] = protocol.JournalEntry{PID: i, Message: strings.Repeat("x", 800)}
	}
	if kept, dropped := newest(entries, 3500); len(kept) != 3 || dropped != 7 || kept[2].PID != 9 {
		t.Errorf("%d kept, %d dropped", len(kept), dropped)
	}
	if kept, dropped := newest(entries, 1); len(kept) != 1 || dropped != 9 {
		t.Errorf("%d kept, %d dropped: one is always there", len(kept), dropped)
	}
	if kept, _ := newest(nil, 1); len(kept) != 0 {
		t.Errorf("%v", kept)
	}
}

// connected is a client of a server in this process, until the test ends.
func connected(t *testing.T, s *mcp.Server) *client.Client {
	t.Helper()
	c := client.NewClient(transport.NewInProcessTransport(s.Protocol()))
	t.Cleanup(func() { c.Close() })
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Initialize(t.Context(), mcpgo.InitializeRequest{Params: mcpgo.InitializeParams{ProtocolVersion: mcpgo.ProtocolVersion20251125}}); err != nil {
		t.Fatal(err)
	}
	return c
}

// With NoLookups, nothing that an assistant types leaves the node that it is typed for.
func TestNoLookups(t *testing.T) {
	const asked = "the fleet would be asked"
	s := mcp.New(mcp.Options{Name: "test", Version: "1", Caller: mcp.Caller{Name: "mcp", Role: protocol.Viewer}})
	f := Add(s, Host{NoLookups: true, Connect: func(context.Context, string) (*Session, error) { return nil, errors.New(asked) }}, true)
	defer f.Close()
	c := connected(t, s)
	for says, commands := range map[string][]string{
		"(--no-lookups)": {"dig secret.example.org", "/run/current-system/sw/bin/dig x.example.org", "host x.example.org", "nslookup x.example.org", "ping -c1 x.example.org",
			"traceroute x.example.org", "tracepath x.example.org", "resolvectl query x.example.org", "arp x.example.org", "getent ahosts x.example.org", "lsof -i @x.example.org", "lsof -i4TCP@x.example.org:80", "'dig' x.example.org | wc -l"},
		asked: {"getent passwd root", "lsof -i :80", "ss -tln", "uptime", "echo dig"},
	} {
		for _, command := range commands {
			r, err := c.CallTool(t.Context(), mcpgo.CallToolRequest{Params: mcpgo.CallToolParams{Name: "remote-command", Arguments: map[string]any{"target": "web1", "command": command}}})
			if err != nil {
				t.Fatal(err)
			}
			if text := r.Content[0].(mcpgo.TextContent).Text; !r.IsError || !strings.Contains(text, says) {
				t.Errorf("%s: expected %q: %s", command, says, text)
			}
		}
	}
}

func FuzzOptions(f *testing.F) {
	for _, seed := range []string{"-rn5 -u a", "--lines=5 --boot", "-b -1 -n", "status a", "-", "--", "-n", "-t", "--=x"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, words string) {
		if q := readUnitQuestion(strings.Fields(words)); q != nil && q.list.Validate() != nil {
			t.Errorf("%q asks %+v", words, q)
		}
		if q := readJournalQuestion(strings.Fields(words), time.Unix(0, 0)); q != nil && q.Validate() != nil {
			t.Errorf("%q asks %+v", words, q)
		}
	})
}

func FuzzFilters(f *testing.F) {
	for _, seed := range []string{"grep -iv x", "head -3", "tail -n 2", "sort -rnu", "uniq -c", "wc -l", "grep -E (a|b)+$", "head -n -1", "grep -", "tail --x"} {
		f.Add(seed, "a\nb\n\nc")
	}
	f.Fuzz(func(t *testing.T, command, output string) {
		argv := strings.Fields(command)
		if len(argv) == 0 {
			return
		}
		all, err := filters([][]string{argv})
		if err != nil {
			return
		}
		through(all, []byte(output))
	})
}
