package project

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nix-infra/nix-infra/protocol"
)

// NodeFacts is what is known of a node: what <node>.ipv4 and <node>.overlayIp are filled in from.
type NodeFacts struct {
	Name      string
	IPv4      string // public; the settings and servers.yaml count more, as their owner wrote them
	OverlayIP string // "" before the node was in the overlay
	Arch      string // such as x86_64-linux
}

// TreeRequest says whose tree is wanted. What is empty is taken from the settings.
type TreeRequest struct {
	Node         string
	NodeModule   string // path below the project, or the bare name of a file in node_types/
	NixOSVersion string
	Arch         string
	SSHKey       string // name below ssh/

	TestDir string // takes the place of the project where nodes/ is looked for; "": that of the node's settings

	Control      bool        // gets node_types/control_node.nix too
	ControlNodes []NodeFacts // of the cluster, in order; none in a fleet
	ClusterUUID  string
	Nodes        []NodeFacts // all known nodes, this one too

	// TrustedKeys reads the public keys of binary caches among the secrets. It is called only for a file
	// that asks for them, because it may need the password. nil will do while there are no such secrets.
	TrustedKeys func() ([]string, error)

	AllowUnknownPlaceholders bool // they stay in place, with a warning
}

// File is one file of a tree.
type File struct {
	Path string      // slash-separated, relative to /etc/nixos
	Mode fs.FileMode // 0644 or 0755
	Data []byte      // shared between the trees of a Project: not to be changed

	digest string // of Data, where it is known: of what every node gets
}

// Digest is the SHA-256 of the file's content, as a manifest has it.
func (f *File) Digest() string {
	if f.digest != "" {
		return f.digest
	}
	return protocol.Digest(f.Data)
}

// Tree is what one node's /etc/nixos is made of, but for the files that are the node's own.
type Tree struct {
	Files    []File   // sorted by path
	Warnings []string // a line each
}

// composer is one tree in the making. It goes on after a mistake, so that all are reported together.
type composer struct {
	TreeRequest
	project *Project
	source  source

	stateVersion string // what NixOSVersion is filled in as where it is the value of system.stateVersion

	servers  []Server
	files    []File
	warnings []string
	errs     []error
}

// Tree composes the files of one node and fills in their placeholders. All mistakes of a tree are
// reported together, a line each, with file and line of the project. It may be called concurrently.
func (p *Project) Tree(r TreeRequest) (*Tree, error) {
	c, err := p.newComposer(r)
	if err != nil {
		return nil, err
	}
	c.add("configuration.nix", "configuration.nix", baseSlot)
	c.add("flake.nix", "flake.nix", flakeSlot)
	if c.Control {
		c.add("node_types/control_node.nix", "control_node.nix", controlSlot)
	}
	if c.NodeModule != "" {
		c.addNodeModule()
	}
	c.addNodeFile()
	if r.TestDir == "" && c.TestDir != "" {
		c.warnings = append(c.warnings, fmt.Sprintf("%s is under the test of %s (its test_dir in %s); nix-infra deploy-apps %s takes it off", c.Node, show(c.TestDir), SettingsFile, c.Node))
	}
	shared, err := p.shared()
	c.files = append(c.files, shared...)
	c.addAgentModule()
	if err := errors.Join(append(c.errs, err)...); err != nil {
		return nil, err
	}
	slices.SortFunc(c.files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return &Tree{Files: c.files, Warnings: c.warnings}, nil
}

// Flake is flake.nix as a node gets it.
func (p *Project) Flake(node string) ([]byte, error) {
	c, err := p.newComposer(TreeRequest{Node: node})
	if err != nil {
		return nil, err
	}
	c.add("flake.nix", "flake.nix", flakeSlot)
	if err := errors.Join(c.errs...); err != nil {
		return nil, err
	}
	return c.files[0].Data, nil
}

func (p *Project) newComposer(r TreeRequest) (*composer, error) {
	if err := ValidNodeName(r.Node); err != nil {
		return nil, err
	}
	servers, err := p.Servers()
	if err != nil {
		return nil, err
	}
	src, err := newSource(p.Dir, "")
	if err != nil {
		return nil, fmt.Errorf("the project folder: %w", err)
	}
	c := &composer{TreeRequest: r, project: p, source: src, servers: servers}
	about, _ := c.lookup(r.Node)
	own := p.Settings.Nodes[r.Node]
	c.NixOSVersion = firstOf(r.NixOSVersion, p.Settings.Node(r.Node).NixOSVersion)
	c.stateVersion = firstOf(p.Settings.StateVersion(r.Node), c.NixOSVersion)
	if p.Settings.Node(r.Node).StateVersion == "" {
		c.stateVersion = min(c.stateVersion, c.NixOSVersion) // one that is given for a single deploy doesn't raise it
	}
	c.Arch = firstOf(r.Arch, own.Arch, about.Arch, p.Settings.Defaults.Arch, DefaultArch)
	c.SSHKey = firstOf(r.SSHKey, p.SSHKeyName())
	c.TestDir = firstOf(r.TestDir, own.TestDir)
	c.NodeModule = firstOf(r.NodeModule, own.NodeModule)
	if !r.Control { // a control node is of another type than most, unless somebody says so
		c.NodeModule = firstOf(c.NodeModule, p.Settings.Defaults.NodeModule)
	}
	return c, errors.Join(validVersion(c.NixOSVersion), validArch(c.Arch), validKeyName(c.SSHKey), validModule(c.NodeModule))
}

// readShared reads what every node gets as it is: modules, app_modules and the lock of the flake.
func (p *Project) readShared() ([]File, error) {
	src, err := newSource(p.Dir, "")
	if err != nil {
		return nil, err
	}
	modules, err := src.walk("modules")
	if errors.Is(err, fs.ErrNotExist) {
		err = missing(p.Dir, "modules/")
	}
	apps, appsErr := src.walk("app_modules")
	if errors.Is(appsErr, fs.ErrNotExist) {
		appsErr = nil
	}
	files := append(modules, apps...)
	lock, lockErr := src.read("flake.lock")
	if lockErr == nil {
		files = append(files, lock)
	} else if errors.Is(lockErr, fs.ErrNotExist) {
		lockErr = nil
	}
	for i := range files {
		files[i].digest = protocol.Digest(files[i].Data)
	}
	return files, errors.Join(err, appsErr, lockErr)
}

func missing(dir, name string) error {
	return fmt.Errorf("%s is missing in %s; a project has configuration.nix, flake.nix and modules/ at its root", name, dir)
}

// add renders a file of the project to its place in the tree.
func (c *composer) add(from, to string, s slot) {
	f, err := c.source.read(from)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		c.errs = append(c.errs, missing(c.project.Dir, from))
	case err != nil:
		c.errs = append(c.errs, err)
	default:
		c.render(f, from, to, s)
	}
}

func (c *composer) render(f File, from, to string, s slot) {
	f.Path = to
	f.Data = fill(f.Data, func(line int, before []byte, key string) (string, bool) {
		value, err := c.resolve(s, key)
		if key == versionKey && err == nil && stateVersion.Match(before) {
			value = c.stateVersion
		}
		if unknown := (unknownError{}); errors.As(err, &unknown) && c.AllowUnknownPlaceholders {
			c.warnings = append(c.warnings, fmt.Sprintf("%s:%d: unknown placeholder [%%%%%s%%%%] left in place: %s", show(from), line, show(key), unknown.hint))
			return "", false
		} else if errors.As(err, &unknown) {
			err = fmt.Errorf("%s:%d: unknown placeholder [%%%%%s%%%%]: %s", show(from), line, show(key), unknown.hint)
		} else if err != nil {
			err = fmt.Errorf("%s:%d: placeholder [%%%%%s%%%%]: %w", show(from), line, show(key), err)
		}
		if err != nil {
			c.errs = append(c.errs, err)
		}
		return value, err == nil
	})
	c.files = append(c.files, f)
}

// addNodeModule fills the slot that all node types share. A fleet's is not rendered: that is how the
// projects of the original are written.
func (c *composer) addNodeModule() {
	name, f, err := c.findNodeModule()
	switch {
	case err != nil:
		c.errs = append(c.errs, err)
	case len(c.ControlNodes) > 0:
		c.render(f, name, "cluster_node.nix", typeSlot)
	default:
		if m := placeholder.Find(f.Data); m != nil {
			c.warnings = append(c.warnings, fmt.Sprintf("%s: %s stays in place: without control nodes, a node type is sent as it is", name, show(string(m))))
		}
		f.Path = "cluster_node.nix"
		c.files = append(c.files, f)
	}
}

func (c *composer) findNodeModule() (string, File, error) {
	module := path.Clean(c.NodeModule)
	tries := []string{module}
	if !strings.Contains(module, "/") {
		tries = []string{module, "node_types/" + module, "node_types/" + module + ".nix"}
	}
	for _, name := range tries {
		if path.Ext(name) != ".nix" {
			continue
		}
		if f, err := c.source.read(name); !errors.Is(err, fs.ErrNotExist) {
			return name, f, err
		}
	}
	var have []string
	found, _ := filepath.Glob(filepath.Join(c.source.root, "node_types", "*.nix"))
	for _, f := range found {
		have = append(have, strings.TrimSuffix(filepath.Base(f), ".nix"))
	}
	bare := strings.TrimSuffix(path.Base(module), ".nix")
	return "", File{}, fmt.Errorf("node module %s does not exist%s", show(c.NodeModule), hint(bare, "node types", have))
}

// addNodeFile adds nodes/<node>.nix where there is one.
func (c *composer) addNodeFile() {
	f, where, err := c.nodeFile()
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		c.errs = append(c.errs, err)
	default:
		c.render(f, where, c.Node+".nix", nodeSlot)
	}
}

// nodeFile reads the node's own file, and tells where it is; fs.ErrNotExist where it has none.
func (c *composer) nodeFile() (f File, where string, err error) {
	src, name := c.source, "nodes/"+c.Node+".nix"
	if c.TestDir != "" {
		dir, err := filepath.EvalSymlinks(locate(c.project.Dir, c.TestDir))
		if err != nil {
			return File{}, "", fmt.Errorf("test folder %s does not exist, neither below the project nor here", show(c.TestDir))
		}
		if rel, err := filepath.Rel(src.root, dir); err == nil && filepath.IsLocal(rel) {
			name = path.Join(filepath.ToSlash(rel), name)
		} else {
			src = source{dir, c.TestDir}
		}
	}
	f, err = src.read(name)
	return f, path.Join(src.name, name), err
}

func sortedSet(s []string) []string {
	slices.Sort(s)
	return slices.Compact(s)
}
