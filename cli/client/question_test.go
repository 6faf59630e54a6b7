package client_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
)

// counts sends so many numbers, and then waits for its end where that is wanted.
func counts(n int, forever bool) map[protocol.Action]fleettest.Streams {
	return map[protocol.Action]fleettest.Streams{protocol.FollowJournal: func(_ *protocol.Verified, send func(any), ended <-chan struct{}) error {
		for i := range n {
			send(i + 1)
		}
		if forever {
			<-ended
		}
		return nil
	}}
}

func TestAnswersInParts(t *testing.T) {
	f := fleettest.New(t)
	f.Add("web1").Script(fleettest.Script{Streams: counts(3, false)})
	f.Add("web2").Script(fleettest.Script{Streams: map[protocol.Action]fleettest.Streams{protocol.FollowJournal: func(_ *protocol.Verified, send func(any), _ <-chan struct{}) error {
		send(1)
		return protocol.Refuse(protocol.Failed, "the disk is full")
	}}})
	c := connect(t, f, "alice", protocol.Viewer)
	got := map[string]string{}
	silent, err := c.Put(soon(t), client.Question{Nodes: []string{"web1", "web2"}, Action: protocol.FollowJournal}, func(node string, r *protocol.Reply, err error) {
		if err != nil {
			got[node] += "!" + err.Error()
			return
		}
		got[node] += fmt.Sprintf("%d:%s ", r.Part, r.Body)
	})
	if err != nil || len(silent) != 0 || got["web1"] != "1:1 2:2 3:3 4: " || got["web2"] != "1:1 !the disk is full" {
		t.Errorf("%v, %v, %v", got, silent, err)
	}
}

func TestEndOfAQuestionIsHeard(t *testing.T) {
	f := fleettest.New(t)
	nodes := []*fleettest.Node{f.Add("web1"), f.Add("web2")}
	for _, n := range nodes {
		n.Script(fleettest.Script{Streams: counts(1, true)})
	}
	c := connect(t, f, "alice", protocol.Viewer)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	parts := 0
	silent, err := c.Put(ctx, client.Question{Nodes: []string{"web1", "web2"}, Action: protocol.FollowJournal, End: true}, func(string, *protocol.Reply, error) {
		if parts++; parts == 2 {
			cancel()
		}
	})
	if err != nil || len(silent) != 2 {
		t.Errorf("%v, %v", silent, err)
	}
	for _, n := range nodes {
		toldToEnd(t, n)
	}
}

// TestLinger: those that are told to stop still say how they did, and one that says nothing is waited for no longer than that.
func TestLinger(t *testing.T) {
	f := fleettest.New(t)
	begins := func(then func(send func(any), ended <-chan struct{})) fleettest.Script {
		return fleettest.Script{Streams: map[protocol.Action]fleettest.Streams{protocol.RunCommand: func(_ *protocol.Verified, send func(any), ended <-chan struct{}) error {
			send("begun")
			then(send, ended)
			return nil
		}}}
	}
	f.Add("web1").Script(begins(func(send func(any), ended <-chan struct{}) {
		<-ended
		send("was ended")
	}))
	hangs := f.Add("hangs")
	hangs.Script(begins(func(func(any), <-chan struct{}) { <-t.Context().Done() }))
	f.Add("later")
	c := connect(t, f, "alice", protocol.Viewer)
	for _, of := range []struct {
		nodes         []string
		linger        time.Duration
		heard, silent string
	}{
		{[]string{"web1", "later"}, awhile, `"begun""was ended"`, "[later]"},
		{[]string{"hangs", "later"}, 100 * time.Millisecond, `"begun"`, "[hangs later]"},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		heard, began := "", time.Now()
		silent, err := c.Put(ctx, client.Question{Nodes: of.nodes, Action: protocol.RunCommand, Concurrency: 1, End: true, Linger: of.linger}, func(node string, r *protocol.Reply, err error) {
			if err != nil || node != of.nodes[0] {
				t.Errorf("%s: %v", node, err)
				return
			}
			heard += string(r.Body)
			cancel()
		})
		if took := time.Since(began); err != nil || fmt.Sprint(silent) != of.silent || heard != of.heard || took >= awhile || len(silent) == 2 && took < of.linger {
			t.Errorf("%v: heard %s, silent %v, %v, in %v", of.nodes, heard, silent, err, took)
		}
	}
	toldToEnd(t, hangs)
}

// TestSlowReader: an answer that waits because the one before is still being read is not late.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	f := fleettest.New(t)
	var nodes []string
	answered := make(chan bool, 9)
	for i := range 9 {
		nodes = append(nodes, fmt.Sprintf("n%d", i))
		f.Add(nodes[i]).Script(fleettest.Script{Answers: func(*protocol.Verified) (any, error) { answered <- true; return 1, nil }})
	}
	const patience = 3 * time.Second
	heard := 0
	silent, err := connect(t, f, "alice", protocol.Viewer).Put(soon(t), client.Question{Nodes: nodes, Action: protocol.RunCommand, Patience: patience}, func(_ string, _ *protocol.Reply, err error) {
		if err != nil {
			t.Error(err)
		}
		if heard++; heard == 1 {
			for range nodes {
				<-answered
			}
		}
		if heard <= 3 {
			time.Sleep(patience / 2) // together, longer than anybody is waited for
		}
	})
	if err != nil || len(silent) != 0 || heard != len(nodes) {
		t.Errorf("heard %d, silent %v, %v", heard, silent, err)
	}
}

// TestEnough: a node that was heard enough of is told to stop, and the others are not.
func TestEnough(t *testing.T) {
	f := fleettest.New(t)
	enough := make(chan string, 1)
	talks := map[protocol.Action]fleettest.Streams{protocol.RunCommand: func(o *protocol.Verified, send func(any), ended <-chan struct{}) error {
		send(string(o.Payload))
		if o.Target == "web1" {
			<-ended
		}
		send("the end")
		return nil
	}}
	web1, web2 := f.Add("web1"), f.Add("web2")
	web1.Script(fleettest.Script{Streams: talks})
	web2.Script(fleettest.Script{Streams: talks})
	heard := map[string]string{}
	silent, err := connect(t, f, "alice", protocol.Viewer).Put(soon(t), client.Question{Nodes: []string{"web1", "web2"}, Action: protocol.RunCommand, End: true, Enough: enough,
		PayloadOf: func(node string) any { return "for " + node }}, func(node string, r *protocol.Reply, err error) {
		if err != nil {
			t.Errorf("%s: %v", node, err)
			return
		}
		var text string
		_ = json.Unmarshal(r.Body, &text) // the last part has none
		if heard[node] += text + ";"; text == `"for web1"` {
			enough <- "web1"
		}
	})
	if err != nil || len(silent) != 0 || heard["web1"] != `"for web1";the end;;` || heard["web2"] != `"for web2";the end;;` {
		t.Errorf("heard %v, silent %v, %v", heard, silent, err)
	}
	toldToEnd(t, web1)
	if o := web2.Orders(); len(o) != 0 {
		t.Errorf("web2 got %+v", o)
	}
}

// toldToEnd waits until a node was told to end what it does.
func toldToEnd(t *testing.T, n *fleettest.Node) {
	t.Helper()
	for deadline := time.Now().Add(awhile); len(n.Orders()) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s was not told to end", n.Name)
		}
	}
	if o := n.Orders(); len(o) != 1 || !o[0].End {
		t.Errorf("%s: %+v", n.Name, o)
	}
}

func TestPatienceAndConcurrency(t *testing.T) {
	t.Parallel()
	f := fleettest.New(t)
	var at, most atomic.Int32
	var names []string
	for i := range 9 {
		name := fmt.Sprintf("n%d", i)
		names = append(names, name)
		f.Add(name).Script(fleettest.Script{Answers: func(o *protocol.Verified) (any, error) {
			now := at.Add(1)
			defer at.Add(-1)
			for m := most.Load(); now > m && !most.CompareAndSwap(m, now); m = most.Load() {
			}
			time.Sleep(5 * time.Millisecond)
			return o.Target, nil
		}})
	}
	hangs := f.Add("hangs")
	hangs.Script(fleettest.Script{Streams: map[protocol.Action]fleettest.Streams{protocol.Ping: func(_ *protocol.Verified, _ func(any), ended <-chan struct{}) error { <-ended; return nil }}})
	f.Register("away")
	all := append([]string{"hangs", "away"}, names...)
	var answered, gone []string
	silent, err := connect(t, f, "alice", protocol.Viewer).Put(soon(t), client.Question{Nodes: all, Action: protocol.Ping, Concurrency: 3, Patience: 3 * time.Second, End: true,
		Gone: func(node string) { gone = append(gone, node) }},
		func(node string, r *protocol.Reply, err error) {
			var target string
			if err != nil || json.Unmarshal(r.Body, &target) != nil || target != node {
				t.Errorf("%s: %v, %v", node, r, err)
			}
			answered = append(answered, node)
		})
	slices.Sort(answered)
	slices.Sort(gone)
	if err != nil || fmt.Sprint(silent) != "[hangs away]" || fmt.Sprint(gone) != "[away hangs]" || !slices.Equal(answered, names) {
		t.Errorf("answered %v, silent %v, gone %v, %v", answered, silent, gone, err)
	}
	if n := most.Load(); n > 3 {
		t.Errorf("%d nodes were asked at the same time", n)
	}
	toldToEnd(t, hangs)

	// Who was never asked, because the time was over, did not answer.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	silent, err = connect(t, f, "alice", protocol.Viewer).Put(ctx, client.Question{Nodes: names, Action: protocol.Ping, Concurrency: 1}, nil)
	if err != nil || !slices.Equal(silent, names) {
		t.Errorf("silent %v, %v", silent, err)
	}
}

// TestBrokenStream: a node that knows nothing of its stream any more says so at the next renewal.
func TestBrokenStream(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as a renewal")
	}
	t.Parallel()
	f := fleettest.New(t)
	kept, forgets, leaves := f.Add("kept"), f.Add("forgets"), f.Add("leaves")
	for _, n := range []*fleettest.Node{kept, forgets, leaves} {
		n.Script(fleettest.Script{Streams: counts(1, true)})
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := connect(t, f, "alice", protocol.Viewer)
	began := 0
	var broke error
	var gone []string
	done := func() {
		if broke != nil && len(gone) == 1 {
			go func() { // the three are not renewed in the same moment
				for len(kept.Orders()) == 0 && ctx.Err() == nil {
					time.Sleep(time.Millisecond)
				}
				cancel()
			}()
		}
	}
	time.AfterFunc(protocol.StreamLifetime, cancel)
	silent, err := c.Put(ctx, client.Question{Nodes: []string{"kept", "forgets", "leaves"}, Action: protocol.FollowJournal, Gone: func(node string) { gone = append(gone, node); done() }},
		func(node string, _ *protocol.Reply, err error) {
			if err != nil {
				broke = fmt.Errorf("%s: %w", node, err)
				done()
			}
			if began++; began == 3 {
				forgets.Forget()
				leaves.Silence()
			}
		})
	if err != nil || fmt.Sprint(silent) != "[kept leaves]" || fmt.Sprint(gone) != "[leaves]" {
		t.Errorf("silent %v, gone %v, %v", silent, gone, err)
	}
	if !errors.Is(broke, &protocol.Refusal{Code: protocol.Unknown}) || !strings.HasPrefix(broke.Error(), "forgets: its answer broke off") {
		t.Errorf("it broke off with %v", broke)
	}
	if o := kept.Orders(); len(o) == 0 || o[0].End {
		t.Errorf("the stream that went on was renewed by %+v", o)
	}
}
