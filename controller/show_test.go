package controller

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// People may see what was deployed to a node, held back or not, and nothing by another node's name.
func TestShowManifestAndBlob(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin, vera := r.person("anna", protocol.Admin), r.person("vera", protocol.Viewer)
	r.online(admin, "n1", "n2")
	manifest := func(node, deployment string) (string, error) {
		a, err := vera.ask(protocol.ShowManifest, protocol.ManifestRequest{Node: node, Deployment: deployment})
		if err != nil {
			return "", err
		}
		m := value[protocol.ManifestReply](t)(protocol.Decode[protocol.ManifestReply](a.Body))
		if m.Digest != "" && protocol.Digest(m.Manifest) != m.Digest {
			t.Errorf("the manifest of %s in %s is another one than its digest says", node, deployment)
		}
		return m.Digest, nil
	}
	if d, err := manifest("n1", ""); err != nil || d != "" {
		t.Errorf("before anything was deployed: %q, %v", d, err)
	}
	items := admin.deploy(t, "d1", 1, "n1")
	admin.released(t, "d1", "n1")
	held := admin.rollRequest(t, "d2", 2, protocol.Strategy{At: time.Now().Add(time.Hour)}, "n1", "n2")
	asked[protocol.Deployment](t, admin, protocol.Deploy, held)
	for _, c := range []struct{ node, deployment, want string }{
		{"n1", "", items[0].Digest}, {"n1", "d1", items[0].Digest}, {"n1", "d2", held.Items[0].Digest}, {"n2", "d2", held.Items[1].Digest}, {"n2", "", ""},
	} {
		if d, err := manifest(c.node, c.deployment); err != nil || d != c.want {
			t.Errorf("%s in %q: %q, %v", c.node, c.deployment, d, err)
		}
	}
	for _, c := range [][2]string{{"n2", "d1"}, {"n2", "d9"}, {"n9", ""}, {"n9", "d1"}} {
		_, err := manifest(c[0], c[1])
		wantCode(t, err, protocol.Unknown)
	}

	blob := func(node, manifest, content string, offset int64) (string, error) {
		a, err := vera.ask(protocol.ShowBlob, protocol.BlobRequest{Node: node, BlobQuery: protocol.BlobQuery{Manifest: manifest, Blob: protocol.Digest([]byte(content)), Offset: offset}})
		if err != nil {
			return "", err
		}
		return string(value[protocol.BlobReply](t)(protocol.Decode[protocol.BlobReply](a.Body)).Data), nil
	}
	tree := "tree of n2 in d2"
	packed := string(compress(t, []byte(tree)))
	if b, err := blob("n2", held.Items[1].Digest, tree, 0); err != nil || b != packed {
		t.Errorf("%q, %v", b, err)
	}
	if b, err := blob("n2", held.Items[1].Digest, tree, 5); err != nil || b != packed[5:] {
		t.Errorf("from the middle: %q, %v", b, err)
	}
	admin.upload(t, []byte("nobody's"))
	for name, c := range map[string]struct{ node, manifest, content string }{
		"other's manifest": {"n1", held.Items[1].Digest, tree},
		"not listed":       {"n2", held.Items[1].Digest, "tree of n1 in d2"},
		"nobody's":         {"n2", held.Items[1].Digest, "nobody's"},
		"no such node":     {"n9", held.Items[1].Digest, tree},
		"no manifest":      {"n2", "", tree},
	} {
		if b, err := blob(c.node, c.manifest, c.content, 0); err == nil {
			t.Errorf("%s: %q was shown", name, b)
		} else {
			wantCode(t, err, protocol.Unknown)
		}
	}
	_, err := blob("n2", held.Items[1].Digest, tree, 1<<40)
	wantCode(t, err, protocol.Invalid)
}

// What a rollout may still need is kept, however many deployments come after it.
func TestGarbageKeepsWhatIsHeldBack(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	s := r.squad(admin, "n1", "n2")
	s.end(always(protocol.Confirmed))
	request := admin.rollRequest(t, "held", 1, protocol.Strategy{OnFailure: protocol.RollbackOnFailure, At: time.Now().Add(time.Hour)}, "n2")
	asked[protocol.Deployment](t, admin, protocol.Deploy, request)
	var first protocol.DeployItem
	for i := range 4 {
		id := fmt.Sprintf("d%d", i)
		items := admin.deploy(t, id, uint64(i+1), "n1")
		if i == 0 {
			first = items[0]
		}
		admin.stands(t, id, protocol.RolloutDone)
	}
	term := r.c.current.Load()
	value[int](t)(term.collect(context.Background(), 0))
	blobs, item := r.c.broker.Blobs, request.Items[0]
	if blobs.Has(first.Digest) {
		t.Error("nothing was collected")
	}
	tree := protocol.Digest([]byte("tree of n2 in held"))
	if !blobs.Has(item.Digest) || !blobs.Has(item.Back) || !blobs.Has(tree) {
		t.Error("what is held back is gone")
	}
	if _, err := admin.ask(protocol.ShowManifest, protocol.ManifestRequest{Node: "n1", Deployment: "d0"}); err == nil {
		t.Error("a manifest that is gone was shown")
	} else {
		wantCode(t, err, protocol.Unknown)
	}
	asked[protocol.Deployment](t, admin, protocol.SteerRollout, protocol.RolloutOrder{ID: "held", Verb: protocol.AbortRollout})
	value[int](t)(term.collect(context.Background(), 0))
	if blobs.Has(item.Back) || blobs.Has(tree) {
		t.Error("what was aborted is kept")
	}
}
