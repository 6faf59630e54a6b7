package fleettest

import (
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// control answers what is asked of the controller.
func (f *Fleet) control() {
	nc := f.Connect("ctl", protocol.Controller)
	_, err := nc.Subscribe(protocol.ControllerRequests, func(m *nats.Msg) {
		order, id, err := f.verified(m.Data, protocol.ControllerName)
		if id.Name == "" {
			return
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.deaf {
			return
		}
		var body any
		if err == nil {
			f.requests = append(f.requests, order.Action)
			body, err = f.serve(order)
		}
		m.Respond(protocol.Encode(protocol.Answer(protocol.ControllerName, body, err)))
	})
	must(f.t, err)
	f.joins(nc)
	must(f.t, nc.Flush())
}

func (f *Fleet) verified(data []byte, targets ...string) (*protocol.Verified, protocol.Identity, error) {
	signed, err := protocol.Decode[protocol.Signed](data)
	if err != nil {
		return nil, protocol.Identity{}, err
	}
	return f.verifier.Verify(&signed, protocol.Expect{Kind: protocol.KindRequest, Targets: targets, Now: time.Now()}, nil)
}

func (f *Fleet) serve(o *protocol.Verified) (any, error) {
	switch o.Action {
	case protocol.ListNodes:
		return f.listNodes(o)
	case protocol.PutNode:
		r, err := protocol.Decode[protocol.NodeRecord](o.Payload)
		if err != nil {
			return nil, err
		}
		r.By = o.Sender.Name
		state := f.records[r.Name]
		if state == nil {
			state = &protocol.NodeState{}
			f.records[r.Name] = state
		}
		if state.Key != "" && state.Key != r.Key && state.Key != r.Replaces {
			return nil, protocol.Refuse(protocol.Conflict, "%s is enrolled with another key", r.Name)
		}
		r.Replaces = ""
		state.NodeRecord = r
		return nil, nil
	case protocol.TagNode:
		r, err := protocol.Decode[protocol.TagsRequest](o.Payload)
		if err != nil {
			return nil, err
		}
		if f.records[r.Node] == nil {
			return nil, protocol.Refuse(protocol.Unknown, "there is no node %q", r.Node)
		}
		f.records[r.Node].Tags = r.Tags
		return nil, nil
	case protocol.RemoveNode:
		r, err := protocol.Decode[protocol.NameRequest](o.Payload)
		if err != nil {
			return nil, err
		}
		if f.records[r.Name] == nil {
			return nil, protocol.Refuse(protocol.Unknown, "there is no node %q", r.Name)
		}
		delete(f.records, r.Name)
		return nil, nil
	case protocol.MissingBlobs:
		r, err := protocol.Decode[protocol.DigestList](o.Payload)
		if err != nil {
			return nil, err
		}
		var missing protocol.DigestList
		for _, d := range r.Digests {
			if _, ok := f.blobs[d]; !ok {
				missing.Digests = append(missing.Digests, d)
			}
		}
		return missing, nil
	case protocol.PutBlobs:
		return nil, f.putBlobs(o.Payload)
	case protocol.Deploy:
		return f.deploy(o)
	case protocol.SteerRollout:
		return f.steer(o)
	case protocol.LockNode:
		return f.lock(o)
	case protocol.ShowManifest:
		return f.showManifest(o.Payload)
	case protocol.ShowBlob:
		return f.showBlob(o.Payload)
	case protocol.PutAccount:
		return f.putAccount(o.Payload)
	case protocol.ListJoinings:
		return f.listJoinings(o.Payload)
	case protocol.AnswerJoining:
		return f.answerJoining(o.Payload)
	case protocol.ShowAudit:
		return f.showAudit(o.Payload)
	case protocol.ShowHealth:
		return f.showHealth()
	case protocol.ShowDeployment:
		return f.showDeployment(o.Payload)
	case protocol.ListDeployments:
		return f.listDeployments(o.Payload)
	}
	return nil, protocol.Refuse(protocol.Unknown, "no action %q here", o.Action)
}

// pageSize is small, so that lists of a test have several pages.
const pageSize = 3

func (f *Fleet) listNodes(o *protocol.Verified) (any, error) {
	page, err := protocol.Decode[protocol.Page](o.Payload)
	if err != nil {
		return nil, err
	}
	var list protocol.NodeList
	var names []string
	for name := range f.records {
		if name > page.After && (len(page.Names) == 0 || slices.Contains(page.Names, name)) && o.Sender.Covers(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for i, name := range names {
		if i == pageSize {
			list.Next = names[i-1]
			break
		}
		list.Nodes = append(list.Nodes, *f.records[name])
	}
	return list, nil
}

func (f *Fleet) listDeployments(payload []byte) (any, error) {
	page, err := protocol.Decode[protocol.Page](payload)
	if err != nil {
		return nil, err
	}
	var list protocol.DeploymentList
	for _, d := range slices.Backward(f.deployments) {
		if len(page.Names) == 0 || slices.Contains(page.Names, d.ID) {
			list.Deployments = append(list.Deployments, f.summary(d))
		}
	}
	return list, nil
}

func (f *Fleet) showDeployment(payload []byte) (any, error) {
	q, err := protocol.Decode[protocol.DeploymentQuery](payload)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(f.deployments, func(d *protocol.Deployment) bool { return d.ID == q.ID })
	if i < 0 {
		return nil, protocol.Refuse(protocol.Unknown, "there is no deployment %q", q.ID)
	}
	all := f.deployments[i].Nodes
	d := f.summary(f.deployments[i])
	var nodes []string
	for name := range all {
		if name > q.After && (len(q.Names) == 0 || slices.Contains(q.Names, name)) {
			nodes = append(nodes, name)
		}
	}
	slices.Sort(nodes)
	if len(nodes) > pageSize {
		nodes = nodes[:pageSize]
		d.Next = nodes[pageSize-1]
	}
	d.Nodes = map[string]protocol.NodeResult{}
	for _, name := range nodes {
		r := all[name]
		if q.Brief && r.Report != nil {
			brief := *r.Report
			brief.Log, brief.FailedUnits = "", nil
			r.Report = &brief
		}
		d.Nodes[name] = r
	}
	return d, nil
}

func (f *Fleet) putBlobs(payload []byte) error {
	b, err := protocol.Decode[protocol.BlobPieces](payload)
	if err != nil {
		return err
	}
	for _, p := range b.Pieces {
		if err := f.putPiece(p); err != nil {
			return err
		}
	}
	return nil
}

// One of each does for all tests: to make them takes longer than what they do.
var (
	decoder, _ = zstd.NewReader(nil)
	encoder, _ = zstd.NewWriter(nil)
)

func (f *Fleet) putPiece(p protocol.BlobPiece) error {
	if f.blobs[p.Digest] != nil {
		return nil // another run was faster
	}
	if p.Offset == 0 {
		f.pieces[p.Digest] = nil
	} else if f.forgets > 0 {
		f.forgets--
		f.pieces[p.Digest] = nil
	}
	if p.Offset != int64(len(f.pieces[p.Digest])) {
		return protocol.Refuse(protocol.Conflict, "piece at %d, expected %d", p.Offset, len(f.pieces[p.Digest]))
	}
	f.pieces[p.Digest] = append(f.pieces[p.Digest], p.Data...)
	if int64(len(f.pieces[p.Digest])) < p.Size {
		return nil
	}
	data, err := decoder.DecodeAll(f.pieces[p.Digest], nil)
	if err != nil || protocol.Digest(data) != p.Digest {
		return protocol.Refuse(protocol.Invalid, "the blob is not %s", p.Digest)
	}
	f.blobs[p.Digest] = data
	f.uploads++
	return nil
}

// ForgetUploads has the controller lose what it has of a blob, as often as it is told.
func (f *Fleet) ForgetUploads(times int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forgets = times
}

// Blob is what the controller keeps under a digest.
func (f *Fleet) Blob(digest string) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.blobs[digest]
}

// Uploads is how many blobs came, and forgets them.
func (f *Fleet) Uploads() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.uploads
	f.uploads = 0
	return n
}

// Manifest is the one that a node should have.
func (f *Fleet) Manifest(node string) *protocol.Manifest {
	r := f.Record(node)
	if r == nil || r.Desired == nil {
		f.t.Fatalf("nothing is desired of %s", node)
	}
	m, _, err := f.verifier.Manifest(f.Blob(r.Desired.Digest), node, time.Now())
	must(f.t, err)
	return m
}

// Tree is the content of the files that a node should have.
func (f *Fleet) Tree(node string) map[string]string {
	tree := map[string]string{}
	for _, file := range f.Manifest(node).Files {
		tree[file.Path] = strings.Clone(string(f.Blob(file.SHA256)))
	}
	return tree
}
