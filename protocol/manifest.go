package protocol

import (
	"fmt"
	"net/url"
	"path"
	"regexp"
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
	Reboot      Mode = "reboot"       // reboot, with the system that a boot staged or else the one that runs, and prove it
)

// Modes are what a system that is brought can be deployed with, in the order in which help lists them. Reboot brings none.
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

// Closure is a system that was built elsewhere. The node substitutes it: it evaluates and builds nothing.
type Closure struct {
	Path   string   `json:"path"`   // store path
	Caches []string `json:"caches"` // URLs of binary caches, as Nix takes them, in order of preference; none: it is there already
	Keys   []string `json:"keys"`   // public keys as Nix has them, "name:base64": one of them must have signed each path
}

// Rollback names a system that the node ran before. It needs neither files nor a network: the node has it, or says
// that it is gone. At most one field is set; the zero value is the system that was proven before the one that runs.
type Rollback struct {
	Generation int    `json:"generation,omitempty"` // of the system profile
	Path       string `json:"path,omitempty"`       // store path
	Before     string `json:"before,omitempty"`     // what ran before this deployment; where it switched nothing, there is nothing to do
}

// Manifest is all that one node has to know to reach a state: signed by a deployer, for this node. Without a Closure
// and a Rollback the node builds Attr from Files. With a Closure, Files is the tree that it was built from, as far as
// that is known; with a Rollback and to reboot there are none.
type Manifest struct {
	Version    int       `json:"v"`
	Node       string    `json:"node"`
	Serial     uint64    `json:"serial"` // only grows; 0 for a dry-activate
	Deployment string    `json:"deployment"`
	Created    time.Time `json:"created"`
	Mode       Mode      `json:"mode"`
	Files      []File    `json:"files"` // sorted by path
	Attr       string    `json:"attr"`  // flake attribute of the system, without the flake
	Impure     bool      `json:"impure,omitempty"`
	Closure    *Closure  `json:"closure,omitempty"`
	Rollback   *Rollback `json:"rollback,omitempty"`
	// Secrets are all that the node shall have, sorted by name; it takes away what it has beyond them. A rollback, and to reboot,
	// brings none: the system that it goes back to has its own.
	Secrets      []SealedSecret `json:"secrets,omitempty"`
	Timeout      int            `json:"timeout"`       // seconds from the start of activation to the proof
	BuildTimeout int            `json:"build_timeout"` // seconds
	Settle       int            `json:"settle"`        // seconds for which no unit may fail after activation
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
	if !slices.Contains(Modes, m.Mode) && m.Mode != Reboot {
		return fmt.Errorf("mode %q; the modes are %v and %s", m.Mode, Modes, Reboot)
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
	if err := m.validateSource(); err != nil {
		return err
	}
	if len(m.Secrets) > 0 && (m.Rollback != nil || m.Mode == Reboot) {
		return fmt.Errorf("a rollback or a reboot brings no secrets")
	}
	if err := checkSecrets(m.Secrets); err != nil {
		return err
	}
	return m.validateFiles()
}

// validateSource checks that the system is to come from exactly one place.
func (m *Manifest) validateSource() error {
	switch c, r := m.Closure, m.Rollback; {
	case m.Mode == Reboot && (c != nil || r != nil || len(m.Files) > 0):
		return fmt.Errorf("a reboot brings no system")
	case c != nil && r != nil || r != nil && len(m.Files) > 0:
		return fmt.Errorf("a rollback brings no system")
	case c != nil:
		return c.validate()
	case r != nil:
		return r.validate()
	case m.Mode != Reboot && len(m.Files) == 0:
		return fmt.Errorf("no files; 1 to %d are possible", MaxFiles)
	}
	return nil
}

const (
	maxCaches   = 16
	maxCacheURL = 1024 // bytes
)

// nixKey is a public key as nix-store --generate-binary-cache-key prints it: a name and 32 bytes in base64.
var nixKey = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}:[A-Za-z0-9+/]{43}=$`)

// nixPath is a store path, by the rules of Nix for names (libstore, path.cc).
var nixPath = regexp.MustCompile(`^/nix/store/[0-9abcdfghijklmnpqrsvwxyz]{32}-[0-9a-zA-Z+\-_?=][0-9a-zA-Z+\-._?=]{0,210}$`)

// cacheSchemes are the kinds of binary caches that a manifest may name.
var cacheSchemes = []string{"http", "https", "s3", "file", "ssh", "ssh-ng"}

// IsStorePath tells whether p has the form of the path of one store object.
func IsStorePath(p string) bool { return nixPath.MatchString(p) }

// CheckCache tells whether a binary cache may be named in a manifest: a URL, because what Nix makes of a word without
// a scheme depends on the machine.
func CheckCache(cache string) error {
	u, err := url.Parse(cache)
	if err != nil || !slices.Contains(cacheSchemes, u.Scheme) || len(cache) > maxCacheURL || strings.ContainsFunc(cache, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("binary cache %.200q: use the URL of one, by %s", cache, strings.Join(cacheSchemes, ", "))
	}
	if u.Query().Has("trusted") {
		return fmt.Errorf("binary cache %s asks to be trusted without signatures; leave \"trusted\" out of its URL", u.Redacted())
	}
	if _, secret := u.User.Password(); secret {
		return fmt.Errorf("binary cache %s: a password in a URL is no secret; use netrc on the nodes", u.Redacted())
	}
	return nil
}

// CheckCacheKey tells whether k is the public key of a binary cache.
func CheckCacheKey(k string) error {
	if !nixKey.MatchString(k) {
		return fmt.Errorf("%.200q is no public key of a binary cache: expected name:base64, as `nix key convert-secret-to-public` prints it", k)
	}
	return nil
}

func (c *Closure) validate() error {
	if !IsStorePath(c.Path) {
		return fmt.Errorf("closure %.300q is not the path of a store object", c.Path)
	}
	if len(c.Caches) > maxCaches || len(c.Keys) > maxCaches {
		return fmt.Errorf("%d binary caches and %d keys; at most %d are possible", len(c.Caches), len(c.Keys), maxCaches)
	}
	if len(c.Caches) > 0 && len(c.Keys) == 0 {
		return fmt.Errorf("binary caches without a key: nothing that comes from them could be trusted")
	}
	for _, u := range c.Caches {
		if err := CheckCache(u); err != nil {
			return err
		}
	}
	for _, k := range c.Keys {
		if err := CheckCacheKey(k); err != nil {
			return err
		}
	}
	return nil
}

func (r *Rollback) validate() error {
	set := 0
	for _, s := range []bool{r.Generation != 0, r.Path != "", r.Before != ""} {
		if s {
			set++
		}
	}
	switch {
	case set > 1:
		return fmt.Errorf("a rollback to more than one system")
	case r.Generation < 0:
		return fmt.Errorf("a rollback to generation %d", r.Generation)
	case r.Path != "" && !IsStorePath(r.Path):
		return fmt.Errorf("a rollback to %.300q, which is not the path of a store object", r.Path)
	case r.Before != "" && !isToken(r.Before):
		return fmt.Errorf("a rollback to before deployment %.80q, which is no deployment's id", r.Before)
	}
	return nil
}

func (m *Manifest) validateFiles() error {
	if len(m.Files) > MaxFiles {
		return fmt.Errorf("%d files; %d are possible", len(m.Files), MaxFiles)
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
	case slices.Contains(NodeFiles, p) || p == FactsFile:
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
	closure := ""
	if m.Closure != nil {
		closure = m.Closure.Path
	}
	return Digest(Encode(struct {
		Files   []File
		Attr    string
		Impure  bool
		Closure string
	}{m.Files, m.Attr, m.Impure, closure}))
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
