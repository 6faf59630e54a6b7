package protocol

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"time"
	"unicode"
)

// Reply answers a request, a node's or a controller's.
type Reply struct {
	Version int             `json:"v"`
	From    string          `json:"from"`
	Part    int             `json:"part,omitempty"` // from 1; 0: it is the only one
	More    bool            `json:"more,omitempty"` // further parts follow
	Refused *Refusal        `json:"refused,omitempty"`
	Body    json.RawMessage `json:"body,omitempty"`
}

// Answer makes a reply of a result or, where err is not nil, of a refusal.
func Answer(from string, body any, err error) Reply {
	r := Reply{Version: Version, From: from}
	if err != nil {
		refusal, ok := err.(*Refusal)
		if !ok {
			refusal = Refuse(Failed, "%v", err)
		}
		r.Refused = refusal
	} else if encoded, ok := body.(json.RawMessage); ok {
		r.Body = encoded
	} else if body != nil {
		r.Body = Encode(body)
	}
	return r
}

// Pong answers Ping.
type Pong struct {
	Agent string    `json:"agent"` // version of the agent
	Time  time.Time `json:"time"`  // by the node's clock
}

// ControllerHealth answers ShowHealth: how the leading controller is.
type ControllerHealth struct {
	Version   string       `json:"version"` // of the program
	Time      time.Time    `json:"time"`    // by its clock
	Etcd      string       `json:"etcd"`    // "" while it answers, else why it does not, one line
	Records   StreamHealth `json:"records"` // the record of who ordered what
	DiskTotal int64        `json:"disk_total"`
	DiskFree  int64        `json:"disk_free"` // bytes, of the file system with its folder
}

// StreamHealth is how a stream of JetStream is.
type StreamHealth struct {
	Error    string `json:"error"` // "" while it answers, else why it does not, one line
	Messages uint64 `json:"messages"`
	Bytes    uint64 `json:"bytes"`
}

// Phase is where a node stands with a manifest. The legal moves are in agent/reconcile.
type Phase string

const (
	Accepted    Phase = "accepted"
	Fetching    Phase = "fetching"
	Building    Phase = "building"
	Activating  Phase = "activating"
	Checking    Phase = "checking"
	Confirming  Phase = "confirming"   // proven; becoming the boot default
	Staged      Phase = "staged"       // mode boot: the boot default, to be proven after the next boot
	Rebooting   Phase = "rebooting"    // mode reboot: until the agent is back
	Confirmed   Phase = "confirmed"    // end: proven
	RollingBack Phase = "rolling-back" //
	RolledBack  Phase = "rolled-back"  // end: the old system runs again
	FailedPhase Phase = "failed"       // end: nothing was switched
)

// Ended tells whether nothing more will happen without a new order. A staged system waits for a boot
// that is not ours to order, so it ends a deployment, too.
func (p Phase) Ended() bool {
	switch p {
	case Confirmed, RolledBack, FailedPhase, Staged:
		return true
	}
	return false
}

// Succeeded tells whether the node did what the manifest asked for.
func (p Phase) Succeeded() bool { return p == Confirmed || p == Staged }

// Beat is a heartbeat: what the controller knows of a node, complete each time, so that a lost one
// costs nothing. An agent sends one every Interval and whenever the phase changes.
type Beat struct {
	Version  int `json:"v"`
	Interval int `json:"interval"` // seconds until the next one is due

	// The newest manifest that the node accepted, and where it stands.
	Serial     uint64 `json:"serial"`
	Deployment string `json:"deployment,omitempty"`
	Phase      Phase  `json:"phase,omitempty"`
	Reason     string `json:"reason,omitempty"` // one line, for people

	Closure      string   `json:"closure,omitempty"`    // store path that runs
	Confirmed    string   `json:"confirmed,omitempty"`  // store path that the last confirmed manifest left; "": the one that runs, or nothing was confirmed yet
	Profile      string   `json:"profile,omitempty"`    // store path that the system profile names, "": the one that runs
	Booted       string   `json:"booted,omitempty"`     // store path that was booted, "": the one that runs
	Quarantine   []string `json:"quarantine,omitempty"` // closures that it rolled back from, the newest MaxQuarantine
	Degraded     []string `json:"degraded,omitempty"`   // of FailedUnits those that had not failed before the last confirmed manifest
	Generation   int      `json:"generation,omitempty"` // of the system profile
	FailedUnits  []string `json:"failed_units,omitempty"`
	RebootNeeded bool     `json:"reboot_needed,omitempty"`
	Kernel       string   `json:"kernel,omitempty"`
	NixOS        string   `json:"nixos,omitempty"`  // nixos-version of the running closure
	System       string   `json:"system,omitempty"` // such as x86_64-linux
	IPv4         string   `json:"ipv4,omitempty"`
	OverlayIP    string   `json:"overlay_ip,omitempty"` // its IPv4 address in the overlay network of its cluster
	BootID       string   `json:"boot_id,omitempty"`
	Agent        string   `json:"agent,omitempty"`   // version of the agent
	Account      int64    `json:"account,omitempty"` // Unix seconds at which the account JWT that it knows was issued

	Vitals Vitals `json:"vitals"`
}

// MaxQuarantine is how many closures a beat names as quarantined.
const MaxQuarantine = 8

// Vitals are the part of a beat that changes all the time and is never written to etcd.
type Vitals struct {
	Uptime       int64      `json:"uptime"` // seconds
	Load         [3]float64 `json:"load"`   // 1, 5 and 15 minutes
	MemTotal     int64      `json:"mem_total"`
	MemAvailable int64      `json:"mem_available"` // bytes
	DiskTotal    int64      `json:"disk_total"`    // bytes, of the file system of /nix/store
	DiskFree     int64      `json:"disk_free"`
}

// Look tells a node that its desired state is another than its beat said.
type Look struct {
	Version int    `json:"v"`
	Serial  uint64 `json:"serial"` // 0: a dry-activate
	Digest  string `json:"digest"` // of the signed manifest
	Account string `json:"account,omitempty"`
}

// ManifestQuery is a node asking for the manifest that a Look named; with an empty digest, for the one
// that it should have.
type ManifestQuery struct {
	Digest string `json:"digest,omitempty"`
}

// ManifestReply is the signed document, zero where nothing was ever deployed.
type ManifestReply struct {
	Digest   string `json:"digest,omitempty"`
	Manifest []byte `json:"manifest,omitempty"`
	Account  string `json:"account,omitempty"` // the newest account JWT; "": the node's last beat shows that it has it
}

// ManifestRequest is ShowManifest's: of a node, the manifest of a deployment or, with "", the one that it should have.
type ManifestRequest struct {
	Node       string `json:"node"`
	Deployment string `json:"deployment,omitempty"`
}

// BlobRequest is ShowBlob's: a piece of a blob that a manifest of the node lists.
type BlobRequest struct {
	Node string `json:"node"`
	BlobQuery
}

// BlobQuery asks for a piece of a blob that the node's manifest (by digest) lists.
type BlobQuery struct {
	Manifest string `json:"manifest"`
	Blob     string `json:"blob"`
	Offset   int64  `json:"offset"`
}

// BlobReply is a piece of the blob's zstd form, at most ChunkSize bytes.
type BlobReply struct {
	Size int64  `json:"size"` // bytes, of the whole compressed blob
	Data []byte `json:"data"`
}

// Event is progress that nobody has to receive: a new phase, or lines of a build log.
type Event struct {
	Version int       `json:"v"`
	Time    time.Time `json:"time"`
	Phase   Phase     `json:"phase"`
	Reason  string    `json:"reason,omitempty"`
	Lines   []string  `json:"lines,omitempty"`
}

// Report is how a manifest ended on a node. It is sent until the controller has acknowledged it.
type Report struct {
	Version     int       `json:"v"`
	Deployment  string    `json:"deployment"`
	Serial      uint64    `json:"serial"`
	Mode        Mode      `json:"mode"`
	Phase       Phase     `json:"phase"`
	Reason      string    `json:"reason,omitempty"`
	Before      string    `json:"before,omitempty"`  // closure that ran before
	Closure     string    `json:"closure,omitempty"` // closure of the manifest, as far as it was built
	Generation  int       `json:"generation,omitempty"`
	Built       bool      `json:"built"` // false where there was nothing to build
	Started     time.Time `json:"started"`
	Ended       time.Time `json:"ended"`
	FailedUnits []string  `json:"failed_units,omitempty"`
	Log         string    `json:"log,omitempty"` // the end of the log of the step that failed, or of a dry run

	Checks []CheckResult `json:"checks,omitempty"` // of the node's declared health checks, in its order
	Plan   *UnitPlan     `json:"plan,omitempty"`   // of a dry run
}

// CheckResult is how one of the health checks that a node declares went.
type CheckResult struct {
	Name   string `json:"name"`
	Kind   string `json:"kind"` // unit, tcp, http, command or file
	Passed bool   `json:"passed"`
	Tries  int    `json:"tries"`
	Millis int64  `json:"ms"`               // from the activation's end to the result
	Reason string `json:"reason,omitempty"` // what the last try that failed said, one line
}

// UnitPlan is what a switch would do.
type UnitPlan struct {
	Stop    []string `json:"stop,omitempty"`
	Restart []string `json:"restart,omitempty"`
	Reload  []string `json:"reload,omitempty"`
	Start   []string `json:"start,omitempty"`

	Secrets  []string        `json:"secrets,omitempty"`  // names of those that would be added, removed or get another value
	Packages []PackageChange `json:"packages,omitempty"` // by name; at most MaxPackages
	More     int             `json:"more,omitempty"`     // changes that are not listed
	Size     int64           `json:"size"`               // bytes, of the new closure
	Growth   int64           `json:"growth"`             // bytes, by which it is larger than the one that runs
}

// MaxPackages bounds UnitPlan.Packages.
const MaxPackages = 500

// PackageChange is what becomes of a package: added without Before, removed without After.
type PackageChange struct {
	Name   string   `json:"name"`
	Before []string `json:"before,omitempty"` // versions; "" is one without
	After  []string `json:"after,omitempty"`
	Growth int64    `json:"growth"` // bytes
}

// MaxReportLog bounds Report.Log, in bytes.
const MaxReportLog = 16 << 10

// Validate keeps a node from writing more, or elsewhere, than a report needs.
func (r *Report) Validate() error {
	switch {
	case !isToken(r.Deployment):
		return fmt.Errorf("deployment id %q is not one subject token of at most 64 characters", r.Deployment)
	case !r.Phase.Ended():
		return fmt.Errorf("phase %q is not an end", r.Phase)
	case len(r.Log) > MaxReportLog || len(r.Reason) > 4096 || len(r.FailedUnits) > 1000 || len(r.Checks) > MaxChecks:
		return fmt.Errorf("the report is too long")
	case r.Plan != nil && len(r.Plan.Packages) > MaxPackages:
		return fmt.Errorf("the report names %d packages, the limit is %d", len(r.Plan.Packages), MaxPackages)
	}
	return nil
}

// MaxChecks is how many health checks a node may declare.
const MaxChecks = 100

// NodeRecord is what the controller keeps of an enrolled node, for as long as it is one.
type NodeRecord struct {
	Name     string    `json:"name"`
	Key      string    `json:"key"`  // public nkey, "U…"
	XKey     string    `json:"xkey"` // public curve key, "X…"; what is sealed goes to the one that JWT proves
	JWT      string    `json:"jwt"`  // the node's user JWT: who asks the controller for a node's keys need not believe it
	Tags     []string  `json:"tags,omitempty"`
	IPv4     string    `json:"ipv4,omitempty"`
	System   string    `json:"system,omitempty"`
	Enrolled time.Time `json:"enrolled"`
	By       string    `json:"by,omitempty"`
	Lock     *Lock     `json:"lock,omitempty"` // nil: it may be deployed to

	Replaces string `json:"replaces,omitempty"` // in PutNode only: the node's public nkey until now, where Key is another one
}

// Lock keeps deployments from a node: new ones that name it are refused, and those under way leave it out.
type Lock struct {
	Reason string    `json:"reason"`
	By     string    `json:"by"`
	At     time.Time `json:"at"`
}

// LockRequest is LockNode's: without a reason the lock is taken away.
type LockRequest struct {
	Node   string `json:"node"`
	Reason string `json:"reason"`
}

// Validate checks that the reason is a line for people.
func (r *LockRequest) Validate() error {
	if len(r.Reason) > 500 || strings.ContainsFunc(r.Reason, unicode.IsControl) {
		return fmt.Errorf("the reason must be one line of at most 500 bytes")
	}
	return CheckName(r.Node)
}

// Validate checks the record's form.
func (r *NodeRecord) Validate() error {
	if err := CheckName(r.Name); err != nil {
		return err
	}
	return checkTags(r.Tags)
}

func checkTags(tags []string) error {
	for _, t := range tags {
		if !label.MatchString(t) {
			return fmt.Errorf("tag %q: use lower-case letters, digits and inner hyphens, at most 63 characters", t)
		}
	}
	return nil
}

// Desired is which manifest a node should have.
type Desired struct {
	Serial     uint64 `json:"serial"`
	Digest     string `json:"digest"`
	Deployment string `json:"deployment"`
	Mode       Mode   `json:"mode"`
}

// NodeState is all that the controller knows of a node.
type NodeState struct {
	NodeRecord
	Serial   uint64     `json:"serial"` // highest of all manifests that it holds for the node: those that are desired, held back or were
	Online   bool       `json:"online"`
	LastSeen *time.Time `json:"last_seen,omitempty"` // nil: never
	Beat     *Beat      `json:"beat,omitempty"`      // the last one
	Desired  *Desired   `json:"desired,omitempty"`
}

// State sums a node up in a word: new (never seen), lost (its beats stopped), pending (it has not
// accepted what it should have), idle (nothing was ever deployed), or the phase of its last manifest.
func (n *NodeState) State() string {
	switch {
	case n.Beat == nil:
		return "new"
	case !n.Online:
		return "lost"
	case n.Desired != nil && n.Desired.Serial > n.Beat.Serial:
		return "pending"
	case n.Beat.Phase == "":
		return "idle"
	}
	return string(n.Beat.Phase)
}

// Page asks for a part of a list, in order of name or id. The answer's Next is the next After; "" ends.
type Page struct {
	After string   `json:"after,omitempty"`
	Limit int      `json:"limit,omitempty"` // 0: as many as fit
	Names []string `json:"names,omitempty"` // only these
}

// NodeList answers ListNodes.
type NodeList struct {
	Nodes []NodeState `json:"nodes"`
	Next  string      `json:"next,omitempty"`
}

// TagsRequest is TagNode's.
type TagsRequest struct {
	Node string   `json:"node"`
	Tags []string `json:"tags"` // all of them, in place of the ones before
}

// Validate checks the tags' form.
func (r *TagsRequest) Validate() error { return checkTags(r.Tags) }

// NameRequest is RemoveNode's and Release's: a node's name, or the store path of the closure that may be
// tried again ("": all that are quarantined).
type NameRequest struct {
	Name string `json:"name"`
}

// DeploymentQuery is ShowDeployment's. The answer has as many nodes as fit, in order of name; its Next
// is the next After, and "" ends.
type DeploymentQuery struct {
	ID    string   `json:"id"`
	Brief bool     `json:"brief,omitempty"` // without what makes reports long: Log and FailedUnits
	Names []string `json:"names,omitempty"` // only these nodes
	After string   `json:"after,omitempty"`
}

// DigestList is MissingBlobs' request (which of these?) and answer (these).
type DigestList struct {
	Digests []string `json:"digests"`
}

// BlobPieces is PutBlobs': pieces of any number of blobs, since a request costs two records and more
// than most blobs do. They are taken in one after the other; those before one that is refused stay.
type BlobPieces struct {
	Pieces []BlobPiece `json:"pieces"`
}

// Validate checks the pieces' form, and that there is not more than one request should carry.
func (b *BlobPieces) Validate() error {
	if len(b.Pieces) == 0 || len(b.Pieces) > MaxPieces {
		return fmt.Errorf("%d pieces; 1 to %d are possible", len(b.Pieces), MaxPieces)
	}
	total := 0
	for i := range b.Pieces {
		if err := b.Pieces[i].Validate(); err != nil {
			return err
		}
		total += len(b.Pieces[i].Data)
	}
	if total > PackSize {
		return fmt.Errorf("the pieces have %d bytes together, the limit is %d", total, PackSize)
	}
	return nil
}

// BlobPiece is a piece of a blob's zstd form. Pieces of one blob are sent in order; the controller keeps
// the blob once the last one is there and the whole hashes to Digest. A blob is a file's content or a
// signed manifest.
type BlobPiece struct {
	Digest string `json:"digest"` // SHA-256 of the uncompressed content
	Size   int64  `json:"size"`   // bytes, of the whole compressed blob
	Offset int64  `json:"offset"`
	Data   []byte `json:"data"`
}

// Validate checks the piece's form.
func (p *BlobPiece) Validate() error {
	n := int64(len(p.Data))
	switch {
	case !IsDigest(p.Digest):
		return fmt.Errorf("%.80q is not a digest", p.Digest)
	case p.Size < 0 || p.Size > MaxBlobSize:
		return fmt.Errorf("blob %s has %d bytes, the limit is %d", p.Digest, p.Size, MaxBlobSize)
	case n > ChunkSize || (n == 0 && p.Size > 0):
		return fmt.Errorf("a piece of %d bytes; 1 to %d are possible", n, ChunkSize)
	case p.Offset < 0 || p.Offset > p.Size-n:
		return fmt.Errorf("a piece of %d bytes at %d of a blob of %d", n, p.Offset, p.Size)
	}
	return nil
}

// DeployItem is one node's part of a deployment.
type DeployItem struct {
	Node   string `json:"node"`
	Serial uint64 `json:"serial"`
	Digest string `json:"digest"` // of the signed manifest, uploaded before as a blob

	// Back is the way back that a rollout with RollbackOnFailure needs for every node: a signed manifest with serial
	// Serial+1, deployment BackID, mode switch and Rollback.Before this deployment.
	Back string `json:"back,omitempty"`
}

// BackID is the id of the deployment that takes a deployment back by itself.
func BackID(deployment string) string { return deployment + "-back" }

// DeployRequest is Deploy's: from here on these manifests are wanted, and the controller releases them by the strategy;
// a dry-activate has none. All or none are taken over; a serial that is not above the node's last one is a Conflict
// that names the node, and so is a node that is locked.
type DeployRequest struct {
	Deployment string       `json:"deployment"`
	Mode       Mode         `json:"mode"`
	Items      []DeployItem `json:"items"`
	Strategy   Strategy     `json:"strategy"`
	Undoes     string       `json:"undoes,omitempty"` // the deployment that this one takes back
}

// Validate checks the request's form.
func (r *DeployRequest) Validate() error {
	if !isToken(BackID(r.Deployment)) {
		return fmt.Errorf("deployment id %.80q is not one subject token of at most %d characters", r.Deployment, 64-len(BackID("")))
	}
	if len(r.Items) == 0 {
		return fmt.Errorf("the deployment names no node")
	}
	for _, i := range r.Items {
		if CheckName(i.Node) != nil || !IsDigest(i.Digest) || (i.Serial == 0) != (r.Mode == DryActivate) {
			return fmt.Errorf("the deployment's entry for %q is not valid", i.Node)
		}
		if back := r.Strategy.OnFailure == RollbackOnFailure; back != (i.Back != "") || back && (!IsDigest(i.Back) || r.Mode != Switch) {
			return fmt.Errorf("the deployment's entry for %q: a way back goes with on-failure rollback and mode switch", i.Node)
		}
	}
	if r.Undoes != "" && !isToken(r.Undoes) {
		return fmt.Errorf("deployment id %.80q is not one subject token of at most 64 characters", r.Undoes)
	}
	if r.Mode == DryActivate && !reflect.DeepEqual(r.Strategy, Strategy{}) {
		return fmt.Errorf("a dry-activate changes nothing and has no strategy")
	}
	return r.Strategy.Validate()
}

// Deployment is the record of a deployment. Nodes is empty in lists.
type Deployment struct {
	ID       string        `json:"id"`
	By       string        `json:"by"`
	Created  time.Time     `json:"created"`
	Mode     Mode          `json:"mode"`
	Strategy Strategy      `json:"strategy"`
	Rollout  RolloutStatus `json:"rollout"` // of a dry-activate: running or done, in one wave
	Undoes   string        `json:"undoes,omitempty"`

	Count map[Phase]int         `json:"count"` // nodes by phase; "" is pending
	Nodes map[string]NodeResult `json:"nodes,omitempty"`
	Next  string                `json:"next,omitempty"` // the name after which the next nodes are asked for
}

// NodeResult is how far a node is with a deployment. Report is nil until it ended.
type NodeResult struct {
	Serial     uint64  `json:"serial"`
	Phase      Phase   `json:"phase"`                // "" until the node was heard of
	Superseded string  `json:"superseded,omitempty"` // the deployment that came after, before this one ended here
	Report     *Report `json:"report,omitempty"`
	Wave       int     `json:"wave"`           // from 1
	Released   bool    `json:"released"`       // false: the node does not know of it (yet)
	Failed     bool    `json:"failed"`         // it counts as failed
	Note       string  `json:"note,omitempty"` // one line, for people: why it is held back, left out or counted as failed, where its report doesn't tell
}

// DeploymentList answers ListDeployments, newest first.
type DeploymentList struct {
	Deployments []Deployment `json:"deployments"`
	Next        string       `json:"next,omitempty"`
}

// AuditRecord is one link of a sender's chain of records: Prev is the digest of the record before it
// ("" for the first). A request is recorded before it runs (Outcome "") and after.
type AuditRecord struct {
	Version int       `json:"v"`
	Seq     uint64    `json:"seq"`
	Prev    string    `json:"prev"`
	Time    time.Time `json:"time"`
	At      string    `json:"at"` // node or controller that writes it
	User    string    `json:"user,omitempty"`
	Role    Role      `json:"role,omitempty"`
	Request string    `json:"request,omitempty"`
	Action  Action    `json:"action,omitempty"`
	Target  string    `json:"target,omitempty"`
	Payload string    `json:"payload,omitempty"` // digest
	Detail  string    `json:"detail,omitempty"`  // what was asked for, in a line: see Detail
	Outcome string    `json:"outcome,omitempty"` // "ok", or a refusal's code
	Reason  string    `json:"reason,omitempty"`
}
