package command

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// hasOwnFiles is a node that answers with the files that belong to it, and with one that doesn't.
func hasOwnFiles(o *protocol.Verified) (any, error) {
	if o.Action != protocol.OwnFiles {
		return nil, protocol.Refuse(protocol.Unknown, "no action %q here", o.Action)
	}
	return protocol.FileList{Files: map[string][]byte{"hardware-configuration.nix": []byte("{ }\n"), "../../evil": []byte("x")}}, nil
}

// newCache is a folder to push to.
func newCache(t *testing.T, s *shell) (dir string) {
	t.Helper()
	needsFakeNix(t)
	dir = t.TempDir()
	s.write("nix-infra.yaml", s.read("nix-infra.yaml")+"cache: { push: 'file://"+dir+"', pull: [ 'https://cache.example.org' ] }\n")
	return dir
}

func TestBuildHere(t *testing.T) {
	s, f := newFleet(t)
	cache := newCache(t, s)
	for _, n := range []string{"web1", "web2"} {
		f.Add(n).Script(fleettest.Script{Answers: hasOwnFiles})
	}
	r := s.run("deploy", "web1", "web2", "--build=local", "-v")
	if r.status != OK || !strings.Contains(r.out, "web1: pushed\n") || !strings.Contains(r.out, "web2 | evaluating path:/") {
		t.Fatalf("status %d\n%s%s", r.status, r.out, r.stderr)
	}
	keys := settings(t, s).Cache.Keys
	if len(keys) != 1 || !strings.HasPrefix(keys[0], "testfleet-1:") || !strings.Contains(r.stderr, keys[0]) {
		t.Fatalf("keys %q in the settings; stderr: %s", keys, r.stderr)
	}
	for _, n := range []string{"web1", "web2"} {
		m := f.Manifest(n)
		if m.Closure == nil || m.Closure.Path != system(n) || !slices.Equal(m.Closure.Caches, []string{"https://cache.example.org"}) || !slices.Equal(m.Closure.Keys, keys) {
			t.Errorf("closure of %s: %+v", n, m.Closure)
		}
		tree := f.Tree(n)
		if tree["flake.nix"] != s.read("flake.nix") || tree["flake.lock"] != "{}\n" || tree["hardware-configuration.nix"] != "" {
			t.Errorf("the tree of %s is not what it was built from: %q", n, tree)
		}
	}
	// What was pushed was signed, after that, with the key of which the settings have the public half.
	log, err := os.ReadFile(filepath.Join(cache, "log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"web1", "web2"} {
		copied, signed := strings.Index(string(log), "copy "+system(n)+"\n"), strings.Index(string(log), "sign "+system(n)+" with testfleet-1:")
		if copied < 0 || signed < copied {
			t.Errorf("%s: not copied and then signed:\n%s", n, log)
		}
	}
	_, secret, _ := strings.Cut(lines(string(log))[len(lines(string(log)))-1], " with ")
	key, err := parseCacheKey([]byte(secret), "what nix read")
	if err != nil || key.public != keys[0] {
		t.Errorf("signed with %q, %v; want %q", key.public, err, keys[0])
	}
	if strings.Contains(r.out+r.stderr, secret) {
		t.Error("the secret key was shown")
	}
	// The second time the key is there.
	if r = s.run("deploy", "web1", "--build=local", "--json"); r.status != OK || r.stderr != "" || len(settings(t, s).Cache.Keys) != 1 {
		t.Errorf("once more: status %d, %q", r.status, r.stderr)
	}
	var states []any
	for _, d := range documents(t, r.out) {
		if d["event"] == "build" {
			states = append(states, d["state"])
		}
	}
	if !slices.Equal(states, []any{"building", "built", "pushing", "pushed"}) {
		t.Errorf("documents: %v", states)
	}
}

func settings(t *testing.T, s *shell) project.Settings {
	t.Helper()
	p, err := project.Open(s.dir, "")
	if err != nil {
		t.Fatal(err)
	}
	return p.Settings
}

// Whatever goes wrong before the end, nothing is wanted of any node.
func TestBuildHereFails(t *testing.T) {
	needsFakeNix(t)
	for name, c := range map[string]struct {
		prepare func(*shell, *fleettest.Fleet, string)
		args    []string
		status  int
		says    string
		logged  string
	}{
		"one build": {
			prepare: func(s *shell, _ *fleettest.Fleet, _ string) { s.write("nodes/web2.nix", "BROKEN\n") },
			status:  SomeFailed, says: "web2: the build failed: attribute 'BROKEN' missing; nothing was deployed"},
		"the push": {
			prepare: func(_ *shell, _ *fleettest.Fleet, cache string) { os.Remove(cache) },
			args:    []string{"--jobs", "1"},
			status:  SomeFailed, says: "copying the closure to file://"},
		"an offline node": {
			prepare: func(_ *shell, f *fleettest.Fleet, _ string) { f.Register("web2") },
			status:  Unanswered, says: "these are offline: web2; leave them out, or have nodes build with --build=node"},
		"a node without an answer": {
			prepare: func(_ *shell, f *fleettest.Fleet, _ string) {
				f.Change("web2", func(n *protocol.NodeState) { n.Online = true })
			},
			status: Unanswered, says: "these are offline: web2"},
		"a node that has no such files": {
			prepare: func(_ *shell, f *fleettest.Fleet, _ string) {
				f.Add("web2").Script(fleettest.Script{Answers: func(*protocol.Verified) (any, error) { return protocol.FileList{}, nil }})
			},
			status: SomeFailed, says: "web2: the build failed: there is no hardware-configuration.nix; nothing was deployed"},
		"a node that refuses": {
			prepare: func(_ *shell, f *fleettest.Fleet, _ string) {
				f.Add("web2").Script(fleettest.Script{Answers: func(*protocol.Verified) (any, error) {
					return nil, protocol.Refuse(protocol.Failed, "the disk is broken")
				}})
			},
			status: Refused, says: "refused: web2: the disk is broken"},
		"no cache": {
			prepare: func(s *shell, _ *fleettest.Fleet, _ string) {
				s.write("nix-infra.yaml", strings.Split(s.read("nix-infra.yaml"), "cache:")[0])
			},
			status: Refused, says: "there is no binary cache to push to: set cache.push in nix-infra.yaml, or give --cache-push"},
		"a cache that nodes can't see": {
			args:   []string{"--cache-push", "file:///srv/cache"},
			status: Refused, says: "nodes can't pull from file:///srv/cache, a folder of this machine: set cache.pull in nix-infra.yaml, or give --cache-pull"},
		"no key": {args: []string{"--cache-key", "/nowhere"}, status: Refused, says: "there is no file /nowhere; check --cache-key"},
	} {
		t.Run(name, func(t *testing.T) {
			s, f := newFleet(t)
			cache := newCache(t, s)
			f.Add("web1").Script(fleettest.Script{Answers: hasOwnFiles})
			f.Register("web2")
			if name == "one build" || name == "the push" {
				f.Add("web2").Script(fleettest.Script{Answers: hasOwnFiles})
			}
			if c.prepare != nil {
				c.prepare(s, f, cache)
			}
			r := s.run(append([]string{"deploy", "web1", "web2", "--build=local"}, c.args...)...)
			all := strings.Split(strings.TrimSpace(r.stderr), "\n")
			if last := all[len(all)-1]; r.status != c.status || !strings.HasPrefix(last, "nix-infra: ") || !strings.Contains(last, c.says) {
				t.Errorf("status %d, want %d with %q\n%s%s", r.status, c.status, c.says, r.out, r.stderr)
			}
			if slices.Contains(f.Requests(), protocol.Deploy) {
				t.Error("something was deployed")
			}
			if log, err := os.ReadFile(filepath.Join(cache, "log")); err == nil {
				t.Errorf("something was pushed: %s", log)
			}
		})
	}
}

// stopper cancels a run once it has said something.
type stopper struct {
	bytes.Buffer
	word string
	stop func()
}

func (s *stopper) Write(p []byte) (int, error) {
	n, err := s.Buffer.Write(p)
	if strings.Contains(s.String(), s.word) {
		s.stop()
	}
	return n, err
}

func TestBuildHereInterrupted(t *testing.T) {
	s, f := newFleet(t)
	cache := newCache(t, s)
	f.Add("web1").Script(fleettest.Script{Answers: hasOwnFiles})
	s.write("modules/slow.nix", "SLOW\n")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	r := s.runContext(ctx, &stopper{word: "web1 | evaluating", stop: stop}, "deploy", "web1", "--build=local", "-v")
	if r.status != Interrupted || !strings.HasSuffix(r.stderr, "nix-infra: interrupted\n") {
		t.Errorf("status %d: %s", r.status, r.stderr)
	}
	if left, _ := os.ReadDir(cache); len(left) > 0 || slices.Contains(f.Requests(), protocol.Deploy) {
		t.Error("it went on")
	}
}

func TestBuildHereWithoutNix(t *testing.T) {
	needsFakeNix(t)
	s, f := lonelyFleet(t)
	f.Add("web1")
	t.Setenv("PATH", t.TempDir())
	s.expect(Refused, "--build=local needs Nix on this machine, and nix is not installed", "deploy", "web1", "--build=local", "--cache-push", "https://cache.example.org")
}

func TestPrebuilt(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	s.expect(Refused, "--build=cache deploys one store path", "deploy", "web1", "--build=cache")
	s.expect(Refused, "is not the path of a store object", "deploy", "web1", "--build=cache", "/nix/store/x")
	s.expect(Refused, "a store path is deployed with --build=cache", "deploy", "web1", system("web1"))
	s.expect(Refused, "there is no binary cache that nodes could pull from", "deploy", "web1", "--build=cache", system("web1"))
	s.expect(Refused, "list the public key of the cache under cache.keys", "deploy", "web1", "--build=cache", system("web1"), "--cache-pull", "https://cache.example.org")
	s.expect(Refused, "--cache-push and --cache-key go with --build=local", "deploy", "web1", "--cache-push", "https://cache.example.org")
	s.expect(Refused, "binary cache \"cache\": use the URL of one", "deploy", "web1", "--build=local", "--cache-push", "cache")
	s.expect(Refused, `--build "here": use node, local or cache`, "deploy", "web1", "--build", "here")
	key := "cache-1:" + strings.Repeat("A", 43) + "="
	s.write("nix-infra.yaml", s.read("nix-infra.yaml")+"cache: { pull: [ 'https://a.example.org' ], keys: [ '"+key+"' ] }\n")
	s.must("deploy", "web1", "--build=cache", system("web1"), "--cache-pull", "https://b.example.org")
	m := f.Manifest("web1")
	if m.Closure == nil || m.Closure.Path != system("web1") || !slices.Equal(m.Closure.Caches, []string{"https://b.example.org"}) || !slices.Equal(m.Closure.Keys, []string{key}) || len(m.Files) != 0 {
		t.Errorf("%+v", m)
	}
}

func TestParseCacheKey(t *testing.T) {
	good, err := newCacheKey("fleet-1")
	if err != nil {
		t.Fatal(err)
	}
	key, err := parseCacheKey(append(good, '\n'), "file")
	if err != nil || protocol.CheckCacheKey(key.public) != nil || string(key.secret) != string(good) {
		t.Errorf("%+v, %v", key, err)
	}
	damaged := append([]byte{}, good...)
	damaged[len(damaged)-10] ^= 1
	for _, bad := range []string{"", "fleet-1", "fleet-1:AAAA", string(damaged), key.public, "a b" + string(good[len("fleet-1"):])} {
		_, err := parseCacheKey([]byte(bad), "the file")
		if err == nil || !strings.HasPrefix(err.Error(), "the file") || len(bad) > 20 && strings.Contains(err.Error(), bad[10:]) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
