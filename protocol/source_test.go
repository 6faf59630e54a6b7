package protocol

import (
	"strings"
	"testing"
)

const (
	storeHash = "/nix/store/0123456789abcdfghijklmnpqrsvwxyz-"
	cacheKey  = "lab-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
)

// Where a system comes from: a manifest names exactly one place.
func TestManifestSources(t *testing.T) {
	closure := func(c Closure) func(*Manifest) {
		return func(m *Manifest) { m.Closure, m.Files = &c, nil }
	}
	rollback := func(r Rollback) func(*Manifest) {
		return func(m *Manifest) { m.Rollback, m.Files = &r, nil }
	}
	good := Closure{Path: storeHash + "nixos-system-n1", Caches: []string{"https://cache.example.org/x?priority=10"}, Keys: []string{cacheKey}}
	cache := func(url string) func(*Manifest) { return closure(Closure{good.Path, []string{url}, good.Keys}) }
	for name, change := range map[string]func(*Manifest){
		"closure":            closure(good),
		"closure with files": func(m *Manifest) { m.Closure = &good },
		"closure in place":   closure(Closure{Path: good.Path}),
		"dry closure":        func(m *Manifest) { m.Closure, m.Mode, m.Serial = &good, DryActivate, 0 },
		"file cache":         cache("file:///srv/cache"),
		"s3 cache":           cache("s3://bucket?region=eu-north-1"),
		"the one before":     rollback(Rollback{}),
		"generation":         rollback(Rollback{Generation: 3}),
		"path":               rollback(Rollback{Path: good.Path}),
		"before":             rollback(Rollback{Before: "20261123-120000-abcd"}),
		"reboot":             func(m *Manifest) { m.Mode, m.Files = Reboot, nil },
	} {
		if err := manifest(change).Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, change := range map[string]func(*Manifest){
		"closure and rollback":     func(m *Manifest) { m.Closure, m.Rollback, m.Files = &good, &Rollback{}, nil },
		"rollback with files":      func(m *Manifest) { m.Rollback = &Rollback{} },
		"reboot with files":        func(m *Manifest) { m.Mode = Reboot },
		"reboot into a closure":    func(m *Manifest) { m.Mode, m.Files, m.Closure = Reboot, nil, &good },
		"reboot without serial":    func(m *Manifest) { m.Mode, m.Files, m.Serial = Reboot, nil, 0 },
		"cache without key":        closure(Closure{good.Path, good.Caches, nil}),
		"too many caches":          closure(Closure{good.Path, make([]string, maxCaches+1), good.Keys}),
		"key":                      closure(Closure{good.Path, good.Caches, []string{"lab-1:short="}}),
		"key with a space":         closure(Closure{good.Path, good.Caches, []string{cacheKey + " other"}}),
		"no scheme":                cache("/srv/cache"),
		"another scheme":           cache("ftp://cache.example.org"),
		"two caches in one":        cache("https://a.example.org https://b.example.org"),
		"a password":               cache("https://user:secret@cache.example.org"),
		"trusted unsigned":         cache("https://cache.example.org?trusted=1"),
		"an option":                cache("--option"),
		"path outside":             closure(Closure{"/etc/passwd", good.Caches, good.Keys}),
		"path below":               closure(Closure{good.Path + "/bin", good.Caches, good.Keys}),
		"path up":                  closure(Closure{storeHash + "..", good.Caches, good.Keys}),
		"path with a line":         closure(Closure{good.Path + "\nx", good.Caches, good.Keys}),
		"short hash":               closure(Closure{"/nix/store/0123-x", good.Caches, good.Keys}),
		"long name":                closure(Closure{storeHash + strings.Repeat("x", 212), good.Caches, good.Keys}),
		"generation and path":      rollback(Rollback{Generation: 1, Path: good.Path}),
		"path and before":          rollback(Rollback{Path: good.Path, Before: "d"}),
		"negative generation":      rollback(Rollback{Generation: -1}),
		"rollback to a file":       rollback(Rollback{Path: "/etc/passwd"}),
		"before what is no id":     rollback(Rollback{Before: "a.b"}),
		"neither files nor source": func(m *Manifest) { m.Files = nil },
	} {
		if manifest(change).Validate() == nil {
			t.Errorf("%s: valid", name)
		}
	}
	if a, b := manifest(func(*Manifest) {}), manifest(func(m *Manifest) { m.Closure = &good }); a.Tree() == b.Tree() {
		t.Error("a closure from elsewhere counts as the tree that is built here")
	}
}

func TestDeployRequest(t *testing.T) {
	d := Digest(nil)
	request := func(change func(*DeployRequest)) *DeployRequest {
		r := &DeployRequest{Deployment: "20261123-120000-abcd", Mode: Switch, Items: []DeployItem{{Node: "n1", Serial: 1, Digest: d}}}
		change(r)
		return r
	}
	back := func(r *DeployRequest) { r.Strategy.OnFailure, r.Items[0].Back = RollbackOnFailure, d }
	for name, change := range map[string]func(*DeployRequest){
		"plain":       func(*DeployRequest) {},
		"way back":    back,
		"dry":         func(r *DeployRequest) { r.Mode, r.Items[0].Serial = DryActivate, 0 },
		"takes back":  func(r *DeployRequest) { r.Undoes = "20261123-110000-abcd" },
		"by a window": func(r *DeployRequest) { r.Strategy.Windows = []Window{{From: 60, To: 120}} },
	} {
		if err := request(change).Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, change := range map[string]func(*DeployRequest){
		"an id that leaves no room for the way back's": func(r *DeployRequest) { r.Deployment = strings.Repeat("a", 60) },
		"no nodes":                 func(r *DeployRequest) { r.Items = nil },
		"no way back":              func(r *DeployRequest) { r.Strategy.OnFailure = RollbackOnFailure },
		"a way back for nothing":   func(r *DeployRequest) { r.Items[0].Back = d },
		"a way back that is none":  func(r *DeployRequest) { back(r); r.Items[0].Back = "x" },
		"a way back from a reboot": func(r *DeployRequest) { back(r); r.Mode = Reboot },
		"dry, and by waves":        func(r *DeployRequest) { r.Mode, r.Items[0].Serial, r.Strategy.Batch = DryActivate, 0, "1" },
		"takes back what is no id": func(r *DeployRequest) { r.Undoes = "a.b" },
		"amount":                   func(r *DeployRequest) { r.Strategy.Canary = "some" },
		"tag":                      func(r *DeployRequest) { r.Strategy.Order = []string{"@db"} },
		"what to do on failure":    func(r *DeployRequest) { r.Strategy.OnFailure = "panic" },
		"a soak of a year":         func(r *DeployRequest) { r.Strategy.Soak = 365 * 24 * 3600 },
		"a negative soak":          func(r *DeployRequest) { r.Strategy.Soak = -1 },
		"a window of no day":       func(r *DeployRequest) { r.Strategy.Windows = []Window{{From: day}} },
	} {
		if request(change).Validate() == nil {
			t.Errorf("%s: valid", name)
		}
	}
}

func TestDrift(t *testing.T) {
	const mine, other = storeHash + "mine", storeHash + "other"
	node := func(change func(*NodeState)) *NodeState {
		n := &NodeState{Desired: &Desired{Serial: 4, Deployment: "d", Mode: Switch},
			Beat: &Beat{Serial: 4, Deployment: "d", Phase: Confirmed, Closure: mine, Generation: 7, Reason: "because"}}
		change(n)
		return n
	}
	for name, c := range map[string]struct {
		change func(*NodeState)
		want   string // part of what is said; "": no drift
	}{
		"as deployed":         {func(*NodeState) {}, ""},
		"never seen":          {func(n *NodeState) { n.Beat = nil }, ""},
		"nothing deployed":    {func(n *NodeState) { n.Beat.Phase = "" }, ""},
		"on its way":          {func(n *NodeState) { n.Beat.Phase, n.Beat.Confirmed = Activating, other }, ""},
		"staged":              {func(n *NodeState) { n.Beat.Phase, n.Beat.Profile = Staged, other }, ""},
		"tested, as ordered":  {func(n *NodeState) { n.Beat.Profile, n.Desired.Mode = other, Test }, ""},
		"rolled back":         {func(n *NodeState) { n.Beat.Phase = RolledBack }, "deployment d rolled back: because"},
		"failed":              {func(n *NodeState) { n.Beat.Phase = FailedPhase }, "deployment d failed: because"},
		"rolled back by hand": {func(n *NodeState) { n.Beat.Deployment = "local-1" }, "rolled back on the node itself (local-1)"},
		"switched by hand":    {func(n *NodeState) { n.Beat.Closure, n.Beat.Confirmed, n.Beat.Booted = other, mine, mine }, "switched to " + other + " by hand (generation 7)"},
		"tested by hand": {func(n *NodeState) {
			n.Beat.Closure, n.Beat.Confirmed, n.Beat.Profile, n.Beat.Booted = other, mine, mine, mine
		}, "activated " + other + " by hand"},
		"an old generation":       {func(n *NodeState) { n.Beat.Closure, n.Beat.Confirmed, n.Beat.Profile = other, mine, mine }, "was booted, an older generation"},
		"another profile by hand": {func(n *NodeState) { n.Beat.Profile = other }, "set the system profile by hand"},
	} {
		got := node(c.change).Drift()
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestLockRequest(t *testing.T) {
	for _, good := range []LockRequest{{Node: "n1", Reason: "being repaired, até amanhã"}, {Node: "n1"}} {
		if err := good.Validate(); err != nil {
			t.Errorf("%+v: %v", good, err)
		}
	}
	for _, bad := range []LockRequest{{Node: "N1", Reason: "x"}, {Node: "n1", Reason: "a\nb"}, {Node: "n1", Reason: "\x1b[2J"}, {Node: "n1", Reason: strings.Repeat("x", 501)}} {
		if bad.Validate() == nil {
			t.Errorf("%+v: valid", bad)
		}
	}
}

func FuzzLockRequest(f *testing.F) {
	fuzzDecode[LockRequest](f, LockRequest{Node: "n1", Reason: "x"})
}
func FuzzGarbageRequest(f *testing.F) {
	fuzzDecode[GarbageRequest](f, GarbageRequest{OlderThan: 3600, Keep: 5})
}
func FuzzGenerationList(f *testing.F) {
	fuzzDecode[GenerationList](f, GenerationList{[]Generation{{Number: 1, Created: now}}})
}
func FuzzGarbageReport(f *testing.F) { fuzzDecode[GarbageReport](f, GarbageReport{Freed: 1}) }
func FuzzFileList(f *testing.F) {
	fuzzDecode[FileList](f, FileList{map[string][]byte{"networking.nix": []byte("{}")}})
}
func FuzzManifestRequest(f *testing.F) {
	fuzzDecode[ManifestRequest](f, ManifestRequest{Node: "n1", Deployment: "d"})
}
func FuzzBlobRequest(f *testing.F) {
	fuzzDecode[BlobRequest](f, BlobRequest{Node: "n1", BlobQuery: BlobQuery{Blob: "x", Offset: 1}})
}
