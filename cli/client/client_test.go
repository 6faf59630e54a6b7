package client_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/protocol"
)

func connect(t testing.TB, f *fleettest.Fleet, name string, role protocol.Role) *client.Client {
	t.Helper()
	c, err := client.Connect(t.Context(), client.Config{URLs: []string{f.URL}, CA: f.Authority.CA.Public(), Signer: f.Signer(name, role), Name: name})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// awhile is much longer than what is waited for takes, on any machine.
const awhile = time.Minute

// soon is a context for what comes.
func soon(t *testing.T) context.Context { return within(t, awhile) }

func TestAsk(t *testing.T) {
	f := fleettest.New(t)
	f.Add("web1").Script(fleettest.Script{Answers: func(o *protocol.Verified) (any, error) {
		if o.Action == protocol.Release {
			return nil, protocol.Refuse(protocol.Unknown, "nothing is quarantined")
		}
		return protocol.NameRequest{Name: o.Sender.Name}, nil
	}})
	c := connect(t, f, "alice", protocol.Admin)
	r, err := c.Ask(soon(t), "web1", protocol.Ping, nil)
	if err != nil || r.From != "web1" || !strings.Contains(string(r.Body), "alice") {
		t.Errorf("answer %+v, %v", r, err)
	}
	_, err = c.Ask(soon(t), "web1", protocol.Release, nil)
	if !errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) {
		t.Errorf("a refusal came back as %v", err)
	}
	ctx := soon(t)
	_, err = c.Ask(ctx, "web2", protocol.Ping, nil)
	if !errors.Is(err, client.ErrNoAnswer) {
		t.Errorf("nobody is there, and the error is %v", err)
	}
	if ctx.Err() != nil {
		t.Error("the broker knows at once that nobody listens, and we waited")
	}
}

func TestAskTimesOut(t *testing.T) {
	f := fleettest.New(t)
	f.Deafen()
	c := connect(t, f, "alice", protocol.Viewer)
	_, err := c.Ask(within(t, 200*time.Millisecond), protocol.ControllerName, protocol.ListNodes, protocol.Page{})
	if !errors.Is(err, client.ErrNoAnswer) {
		t.Errorf("the controller hangs, and the error is %v", err)
	}
}

// The broker itself refuses what a role may not publish; that must not look like silence.
func TestRoleThatDoesNotReach(t *testing.T) {
	f := fleettest.New(t)
	f.Add("web1")
	c := connect(t, f, "bob", protocol.Viewer)
	ctx, overRole := soon(t), &protocol.Refusal{Code: protocol.OverRole}
	if err := c.Controller(t.Context(), protocol.TagNode, protocol.TagsRequest{Node: "web1"}, nil); !errors.Is(err, overRole) {
		t.Errorf("a viewer tagged a node: %v", err)
	}
	if _, err := c.Broadcast(ctx, protocol.Release, nil, []string{"web1"}, nil); !errors.Is(err, overRole) {
		t.Errorf("a viewer broadcast an order: %v", err)
	}
	if _, err := c.AskMany(ctx, []string{"web1"}, protocol.Release, nil, nil); !errors.Is(err, overRole) {
		t.Errorf("a viewer gave an order: %v", err)
	}
	if ctx.Err() != nil {
		t.Error("the refusals took as long as silence")
	}
}

func TestManyAnswer(t *testing.T) {
	f := fleettest.New(t)
	names := []string{"a1", "a2", "a3", "a4", "a5"}
	for _, n := range names {
		f.Add(n)
	}
	c := connect(t, f, "alice", protocol.Admin)
	for _, way := range []struct {
		name   string
		expect []string
		run    func([]string, client.Each) ([]string, error)
		hear   []string
		silent []string
	}{
		{"broadcast", append(names, "gone"), func(to []string, each client.Each) ([]string, error) {
			ctx, end := context.WithCancel(t.Context()) // who is gone is waited for until then
			defer end()
			left := len(names)
			return c.Broadcast(ctx, protocol.Ping, nil, to, func(node string, r *protocol.Reply, err error) {
				each(node, r, err)
				if left--; left == 0 {
					end()
				}
			})
		}, names, []string{"gone"}},
		{"broadcast, some expected", names[:2], func(to []string, each client.Each) ([]string, error) {
			return c.Broadcast(soon(t), protocol.Ping, nil, to, each)
		}, names[:2], nil},
		{"ask some", append(slices.Clone(names[1:3]), "gone"), func(to []string, each client.Each) ([]string, error) {
			return c.AskMany(soon(t), to, protocol.Ping, nil, each)
		}, names[1:3], []string{"gone"}},
		{"ask nobody", nil, func(to []string, each client.Each) ([]string, error) {
			return c.AskMany(soon(t), to, protocol.Ping, nil, each)
		}, nil, nil},
	} {
		t.Run(way.name, func(t *testing.T) {
			var heard []string
			silent, err := way.run(way.expect, func(node string, r *protocol.Reply, err error) {
				if err != nil || r.From != node {
					t.Errorf("%s: %+v, %v", node, r, err)
				}
				heard = append(heard, node)
			})
			slices.Sort(heard)
			if err != nil || !slices.Equal(heard, way.hear) || !slices.Equal(silent, way.silent) {
				t.Errorf("heard %v, silent %v, %v", heard, silent, err)
			}
		})
	}
}

// A node may publish on its own reply subjects as often as it likes, also on ones that it was not asked
// on: nothing of that may count as another's answer, or as a second one.
func TestOnlyTheAskedNodeIsHeard(t *testing.T) {
	f := fleettest.New(t)
	evil := f.Add("evil")
	good := f.Add("good")
	evil.Script(fleettest.Script{Answers: func(o *protocol.Verified) (any, error) {
		reply := protocol.Encode(protocol.Answer("good", nil, nil))
		for range 3 {
			evil.Say(protocol.ReplySubject(o.Sender.Name, o.ID, "good"), reply) // the broker drops it
			evil.Say(protocol.ReplySubject(o.Sender.Name, o.ID, "evil"), reply)
		}
		return nil, nil
	}})
	good.Script(fleettest.Script{Answers: func(*protocol.Verified) (any, error) {
		return nil, protocol.Refuse(protocol.Failed, "really good")
	}})
	c := connect(t, f, "alice", protocol.Admin)
	heard := map[string]int{}
	_, err := c.Broadcast(soon(t), protocol.Ping, nil, []string{"evil", "good"}, func(node string, _ *protocol.Reply, err error) {
		heard[node]++
		if node == "good" && (err == nil || err.Error() != "really good") {
			t.Errorf("good was answered for: %v", err)
		}
	})
	if err != nil || heard["good"] != 1 || heard["evil"] != 1 {
		t.Errorf("heard %v, %v", heard, err)
	}
}

func TestListNodes(t *testing.T) {
	f := fleettest.New(t)
	for i := range 10 { // several pages
		f.Register(fmt.Sprintf("n%d", i))
	}
	c := connect(t, f, "alice", protocol.Viewer)
	nodes, err := c.ListNodes(t.Context())
	if err != nil || len(nodes) != 10 || nodes[9].Name != "n9" {
		t.Errorf("%d nodes, %v", len(nodes), err)
	}
	if _, err := c.Node(t.Context(), "nobody"); !errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) {
		t.Errorf("node nobody: %v", err)
	}
	if n, err := c.Node(t.Context(), "n3"); err != nil || n.Name != "n3" {
		t.Errorf("node n3: %v, %v", n, err)
	}
}

func TestUpload(t *testing.T) {
	f := fleettest.New(t)
	c := connect(t, f, "alice", protocol.Deployer)
	big := make([]byte, 3*protocol.ChunkSize+17)
	source := rand.NewChaCha8([32]byte{1})
	source.Read(big) // does not compress: several pieces
	blobs := map[string][]byte{}
	for _, data := range [][]byte{slices.Clone(big), []byte("small"), {}} {
		blobs[protocol.Digest(data)] = data
	}
	done, err := c.Upload(t.Context(), blobs)
	if err != nil || done.Blobs != 3 || done.Bytes < int64(len(big)) {
		t.Fatalf("%+v, %v", done, err)
	}
	// What a controller has of a blob is lost with it; whoever sends it begins again, and not for ever.
	big = big[:protocol.ChunkSize+17]
	source.Read(big)
	again := map[string][]byte{protocol.Digest(big): slices.Clone(big)}
	f.ForgetUploads(2)
	if done, err = c.Upload(t.Context(), again); err != nil || done.Blobs != 1 || !slices.Equal(f.Blob(protocol.Digest(big)), big) {
		t.Errorf("where its beginning is lost twice: %+v, %v", done, err)
	}
	source.Read(big)
	f.ForgetUploads(100)
	if _, err = c.Upload(t.Context(), map[string][]byte{protocol.Digest(big): big}); !errors.Is(err, &protocol.Refusal{Code: protocol.Conflict}) {
		t.Errorf("where it is lost again and again: %v", err)
	}
	f.ForgetUploads(0)
	f.Requests()
	for i := range 3000 { // more than go into one request
		data := fmt.Appendf(nil, "file %d", i)
		blobs[protocol.Digest(data)] = data
	}
	if done, err = c.Upload(t.Context(), blobs); err != nil || done.Blobs != 3000 {
		t.Fatalf("%+v, %v", done, err)
	}
	if requests := f.Requests(); len(requests) != 3 {
		t.Errorf("3000 small blobs took the requests %v, want one to ask and two to send", requests)
	}
	for digest, data := range blobs {
		if got := f.Blob(digest); !slices.Equal(got, data) {
			t.Errorf("blob %s: %d bytes arrived of %d", digest[:8], len(got), len(data))
		}
	}
	blobs[protocol.Digest([]byte("new"))] = []byte("new")
	if done, err = c.Upload(t.Context(), blobs); err != nil || done.Blobs != 1 {
		t.Errorf("the second time: %+v, %v", done, err)
	}
}

func TestWatch(t *testing.T) {
	f := fleettest.New(t)
	n := f.Add("web1")
	c := connect(t, f, "alice", protocol.Viewer)
	events := make(chan string, 10)
	stop, err := c.Watch("d1", func(node string, e protocol.Event) { events <- node + " " + string(e.Phase) })
	if err != nil {
		t.Fatal(err)
	}
	n.Say(protocol.EventSubject("web1", "d1"), []byte("rubbish"))
	n.Say(protocol.EventSubject("web1", "d2"), protocol.Encode(protocol.Event{Version: 1, Phase: protocol.Checking}))
	n.Say(protocol.EventSubject("web1", "d1"), protocol.Encode(protocol.Event{Version: 1, Phase: protocol.Building}))
	select {
	case e := <-events:
		if e != "web1 building" {
			t.Errorf("heard %q", e)
		}
	case <-time.After(awhile):
		t.Error("no event")
	}
	stop()
	stop()
}

func TestConnectSaysWhatIsWrong(t *testing.T) {
	f := fleettest.New(t)
	other, err := provision.NewCA("other", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	stranger := fleettest.New(t)
	expired, _, err := protocol.ParseCredentials(f.Credentials("old", protocol.Admin, time.Now().Add(-time.Hour)))
	if err != nil {
		t.Fatal(err)
	}
	good := client.Config{URLs: []string{f.URL}, CA: f.Authority.CA.Public(), Signer: f.Signer("alice", protocol.Admin), Name: "alice", Timeout: awhile}
	for name, c := range map[string]struct {
		change func(*client.Config)
		want   string
	}{
		"nobody listens":       {func(c *client.Config) { c.URLs = []string{"tls://127.0.0.1:1", "wss://127.0.0.1:1"} }, "can't reach the controller at tls://127.0.0.1:1, wss://127.0.0.1:1; check"},
		"refused":              {func(c *client.Config) { c.URLs = []string{"tls://127.0.0.1:1"} }, "connection refused"},
		"another CA":           {func(c *client.Config) { c.CA = other.Public() }, "its certificate is not by the project's CA"},
		"another address":      {func(c *client.Config) { c.URLs = []string{strings.Replace(f.URL, "127.0.0.1", "localhost", 1)} }, "enroll the controller again with --address"},
		"another fleet's user": {func(c *client.Config) { c.Signer = stranger.Signer("alice", protocol.Admin) }, "refuses the credentials of alice"},
		"expired":              {func(c *client.Config) { c.Signer, c.Name = expired, "old" }, "credentials of old"},
	} {
		t.Run(name, func(t *testing.T) {
			config := good
			c.change(&config)
			_, err := client.Connect(t.Context(), config)
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want one line with %q", err, c.want)
			}
		})
	}
}

// Probe tells of each URL by itself, and when the certificate there ends.
func TestProbe(t *testing.T) {
	f := fleettest.New(t)
	config := client.Config{URLs: []string{"tls://127.0.0.1:1"}, CA: f.Authority.CA.Public(), Signer: f.Signer("alice", protocol.Viewer), Name: "alice", Timeout: awhile}
	ends, err := client.Probe(t.Context(), config, f.URL)
	if err != nil || time.Until(ends) < 24*time.Hour {
		t.Errorf("its certificate ends at %v, %v", ends, err)
	}
	if ends, err := client.Probe(t.Context(), config, "tls://127.0.0.1:1"); err == nil || !strings.Contains(err.Error(), "tls://127.0.0.1:1") || !ends.IsZero() {
		t.Errorf("nobody there: %v, %v", ends, err)
	}
	config.Signer, config.Name = fleettest.New(t).Signer("alice", protocol.Viewer), "alice"
	if ends, err := client.Probe(t.Context(), config, f.URL); err == nil || ends.IsZero() {
		t.Errorf("refused credentials: %v, %v", ends, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := client.Probe(ctx, config, f.URL); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

func TestConnectCanBeInterrupted(t *testing.T) {
	f := fleettest.New(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := client.Connect(ctx, client.Config{URLs: []string{f.URL}, CA: f.Authority.CA.Public(), Signer: f.Signer("alice", protocol.Admin), Name: "alice"})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestFindDeployment(t *testing.T) {
	f := fleettest.New(t)
	f.Add("web1")
	c := connect(t, f, "alice", protocol.Admin)
	ids := []string{"20260101-a", "20260102-a", "20260102-b", "20260102-b-back"}
	for i, id := range ids {
		mode := protocol.Switch
		if i == len(ids)-1 {
			mode = protocol.Boot
		}
		doc, err := f.Signer("alice", protocol.Admin).Manifest(&protocol.Manifest{Version: protocol.Version, Node: "web1", Serial: uint64(i + 1), Deployment: id, Created: time.Now(), Mode: mode,
			Attr: protocol.SystemAttr("web1"), Rollback: &protocol.Rollback{}, Timeout: 10, BuildTimeout: 10})
		if err != nil {
			t.Fatal(err)
		}
		digest := protocol.Digest(doc)
		if _, err := c.Upload(t.Context(), map[string][]byte{digest: doc}); err != nil {
			t.Fatal(err)
		}
		if err := c.Deploy(t.Context(), protocol.DeployRequest{Deployment: id, Mode: mode, Items: []protocol.DeployItem{{Node: "web1", Serial: uint64(i + 1), Digest: digest}}}); err != nil {
			t.Fatal(err)
		}
	}
	for called, want := range map[string]string{
		"20260102-a": "20260102-a", "20260101": "20260101-a", "20260102-b": "20260102-b", "20260102-b-": "20260102-b-back", client.Newest: "20260102-b",
		"2026": "", "20260102": "", "": "", "x": "", "20260102-b-back-": "",
	} {
		d, err := c.FindDeployment(t.Context(), called, func(d *protocol.Deployment) bool { return d.Mode == protocol.Switch })
		if want == "" && err == nil || want != "" && (err != nil || d.ID != want) {
			t.Errorf("%q is %+v, %v; want %q", called, d, err, want)
		}
	}
	if s, err := c.Summary(t.Context(), "20260102-a"); err != nil || s.ID != "20260102-a" || len(s.Nodes) != 0 {
		t.Errorf("summary: %+v, %v", s, err)
	}
	if _, err := c.Summary(t.Context(), "20260102"); !errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) {
		t.Errorf("a summary of no deployment: %v", err)
	}
}
