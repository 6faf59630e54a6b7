package protocol

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"time"
)

// Mode is what a node does with a closure once it is built, in the words of switch-to-configuration.
type Mode string

const (
	Switch      Mode = "switch"       // activate, prove, make it the boot default
	Boot        Mode = "boot"         // make it the boot default; it is proven after the next boot
	Test        Mode = "test"         // activate and prove; the boot default stays
	DryActivate Mode = "dry-activate" // build and say what would change; nothing is desired or kept
)

// Modes are all modes, in the order in which help lists them.
var Modes = []Mode{Switch, Boot, Test, DryActivate}

// Limits of a manifest.
const (
	MaxFiles    = 20_000
	MaxFileSize = 16 << 20
	MaxTreeSize = 256 << 20
)

// MaxBlobSize is what a file of the largest size may have in its zstd form: zstd adds a few bytes to
// what it can't compress.
const MaxBlobSize = MaxFileSize + 1<<20

// DryRunLifetime is how long a dry-activate manifest is good for: it has no serial to protect it.
const DryRunLifetime = 15 * time.Minute

// NodeFiles belong to the node: they survive every deploy and no manifest may carry them.
var NodeFiles = []string{"hardware-configuration.nix", "networking.nix"}

// File is one file of a node's source tree; the content travels apart, as a blob.
type File struct {
	Path   string `json:"path"` // slash-separated, relative to /etc/nixos
	SHA256 string `json:"sha256"`
	Size   int64  `json:"size"` // bytes
	Exec   bool   `json:"exec,omitempty"`
}

// Manifest is all that one node has to know to reach a state: signed by a deployer, for this node.
type Manifest struct {
	Version      int       `json:"v"`
	Node         string    `json:"node"`
	Serial       uint64    `json:"serial"` // only grows; 0 for a dry-activate
	Deployment   string    `json:"deployment"`
	Created      time.Time `json:"created"`
	Mode         Mode      `json:"mode"`
	Files        []File    `json:"files"` // sorted by path
	Attr         string    `json:"attr"`  // flake attribute of the system, without the flake
	Impure       bool      `json:"impure,omitempty"`
	Timeout      int       `json:"timeout"`       // seconds from the start of activation to the proof
	BuildTimeout int       `json:"build_timeout"` // seconds
	Settle       int       `json:"settle"`        // seconds for which no unit may fail after activation
}

// SystemAttr is the flake attribute of a node's system.
func SystemAttr(node string) string {
	return `nixosConfigurations."` + node + `".config.system.build.toplevel`
}

// Validate checks all that can be checked without the blobs.
func (m *Manifest) Validate() error {
	if m.Version != Version {
		return Refuse(OtherVersion, "the manifest is of version %d, this side speaks version %d; upgrade the older one", m.Version, Version)
	}
	if err := CheckName(m.Node); err != nil {
		return err
	}
	if !slices.Contains(Modes, m.Mode) {
		return fmt.Errorf("mode %q; the modes are %v", m.Mode, Modes)
	}
	if (m.Serial == 0) != (m.Mode == DryActivate) {
		return fmt.Errorf("serial %d with mode %s", m.Serial, m.Mode)
	}
	if !isToken(m.Deployment) {
		return fmt.Errorf("deployment id %q is not one subject token of at most 64 characters", m.Deployment)
	}
	if m.Attr != SystemAttr(m.Node) {
		return fmt.Errorf("attribute %q is not the node's own system", m.Attr)
	}
	if m.Timeout < 1 || m.Timeout > 24*3600 || m.BuildTimeout < 1 || m.BuildTimeout > 7*24*3600 {
		return fmt.Errorf("timeout %d s or build timeout %d s is out of range", m.Timeout, m.BuildTimeout)
	}
	if m.Settle < 0 || m.Settle >= m.Timeout {
		return fmt.Errorf("settle time %d s must be shorter than the timeout of %d s", m.Settle, m.Timeout)
	}
	return m.validateFiles()
}

func (m *Manifest) validateFiles() error {
	if len(m.Files) == 0 || len(m.Files) > MaxFiles {
		return fmt.Errorf("%d files; 1 to %d are possible", len(m.Files), MaxFiles)
	}
	var total int64
	for i, f := range m.Files {
		if err := checkPath(f.Path); err != nil {
			return err
		}
		if i > 0 {
			before := m.Files[i-1].Path
			if f.Path <= before {
				return fmt.Errorf("file %q is listed twice or out of order", f.Path)
			}
		}
		if !IsDigest(f.SHA256) {
			return fmt.Errorf("file %q has no valid digest", f.Path)
		}
		if f.Size < 0 || f.Size > MaxFileSize {
			return fmt.Errorf("file %q has %d bytes, the limit is %d", f.Path, f.Size, MaxFileSize)
		}
		total += f.Size
	}
	if total > MaxTreeSize {
		return fmt.Errorf("the files have %d bytes, the limit is %d", total, MaxTreeSize)
	}
	return m.checkParents()
}

// checkParents refuses a file that stands where another file needs a folder.
func (m *Manifest) checkParents() error {
	files := make(map[string]bool, len(m.Files))
	for _, f := range m.Files {
		files[f.Path] = true
	}
	for _, f := range m.Files {
		for dir := path.Dir(f.Path); dir != "."; dir = path.Dir(dir) {
			if files[dir] {
				return fmt.Errorf("%q is a file and a folder at once", dir)
			}
		}
	}
	return nil
}

func checkPath(p string) error {
	switch {
	case p == "" || len(p) > 1024 || path.Clean(p) != p || path.IsAbs(p) || p == "." || p == ".." || strings.HasPrefix(p, "../"):
		return fmt.Errorf("file path %q is not a clean path inside the tree", p)
	case strings.ContainsAny(p, "\x00\n\r\\"):
		return fmt.Errorf("file path %q has a control character or a backslash", p)
	case slices.Contains(NodeFiles, p):
		return fmt.Errorf("%q belongs to the node", p)
	}
	for _, part := range strings.Split(p, "/") {
		if len(part) > 255 || part == ".git" {
			return fmt.Errorf("file path %q: %q can't be deployed", p, part)
		}
	}
	return nil
}

func isToken(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for _, c := range s {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-') {
			return false
		}
	}
	return true
}

// Tree is the digest of what would be built: two manifests with the same one differ in nothing that
// reaches the closure.
func (m *Manifest) Tree() string {
	return Digest(Encode(struct {
		Files  []File
		Attr   string
		Impure bool
	}{m.Files, m.Attr, m.Impure}))
}

// Blobs are the distinct digests that the manifest lists.
func (m *Manifest) Blobs() []string {
	digests := make([]string, 0, len(m.Files))
	for _, f := range m.Files {
		digests = append(digests, f.SHA256)
	}
	slices.Sort(digests)
	return slices.Compact(digests)
}

// Manifest signs m for its node and gives the bytes that are stored and handed to the node; their
// Digest names them.
func (s *Signer) Manifest(m *Manifest) ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", m.Node, err)
	}
	h := Header{Version: Version, Kind: KindManifest, ID: m.Deployment, Action: Deploy, Target: m.Node, NotBefore: m.Created.Unix()}
	if m.Mode == DryActivate {
		h.Expires = m.Created.Add(DryRunLifetime).Unix()
	}
	signed, err := s.Sign(h, Encode(m))
	if err != nil {
		return nil, err
	}
	doc := Encode(signed)
	if len(doc) > MaxMessage/2 {
		return nil, fmt.Errorf("manifest of %s has %d bytes, the limit is %d: the project has too many files", m.Node, len(doc), MaxMessage/2)
	}
	return doc, nil
}

// Manifest verifies a signed manifest for a node. The serial is the receiver's to judge.
func (v *Verifier) Manifest(doc []byte, node string, now time.Time) (*Manifest, Identity, error) {
	signed, err := Decode[Signed](doc)
	if err != nil {
		return nil, Identity{}, Refuse(Malformed, "the manifest: %v", err)
	}
	order, id, err := v.Verify(&signed, Expect{Kind: KindManifest, Targets: []string{node}, Now: now}, nil)
	if err != nil {
		return nil, id, err
	}
	m, err := Decode[Manifest](order.Payload)
	if err != nil {
		return nil, id, Refuse(Malformed, "the manifest: %v", err)
	}
	switch {
	case m.Node != node || m.Deployment != order.ID || order.Action != Deploy:
		return nil, id, Refuse(Misaddressed, "the manifest is for %s in deployment %s, its signature for %s in %s", m.Node, m.Deployment, node, order.ID)
	case m.Mode == DryActivate && order.Expires == 0:
		return nil, id, Refuse(Invalid, "a dry-activate manifest that never expires")
	}
	return &m, id, nil
}
