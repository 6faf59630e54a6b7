package project

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// SettingsFile is the name of the settings below the project folder.
const SettingsFile = "nix-infra.yaml"

// What is meant when nothing is said.
const (
	DefaultArch   = "x86_64-linux"
	DefaultSSHKey = "nixinfra"
)

// Settings is nix-infra.yaml.
type Settings struct {
	Fleet       string                    `yaml:"fleet"`               // a DNS label
	Controllers []string                  `yaml:"controllers"`         // tls://host:4222 and wss://host:443, in order of preference
	Defaults    Defaults                  `yaml:"defaults,omitempty"`  // for every node
	Rollout     Rollout                   `yaml:"rollout,omitempty"`   // how deployments reach their nodes, where flags don't say
	Cache       Cache                     `yaml:"cache,omitempty"`     // the binary cache of systems that are built here
	SSHKey      string                    `yaml:"ssh_key,omitempty"`   // name of the key pair below ssh/
	Provision   Provision                 `yaml:"provision,omitempty"` // how machines are made and brought in, where flags don't say
	Cluster     Cluster                   `yaml:"cluster,omitempty"`   // what the nodes of a cluster have in common
	Agent       AgentSettings             `yaml:"agent,omitempty"`     // how the nodes' configuration gets the agent
	Secrets     map[string]SecretSettings `yaml:"secrets,omitempty"`   // what holds for some secrets, by name
	Nodes       map[string]NodeSettings   `yaml:"nodes,omitempty"`     // what differs, by node
}

// Defaults hold for each node that does not say otherwise.
type Defaults struct {
	NixOSVersion string `yaml:"nixos_version,omitempty"`  // such as 25.11
	StateVersion string `yaml:"state_version,omitempty"`  // for system.stateVersion: what was the version when the nodes were new
	NodeModule   string `yaml:"node_module,omitempty"`    // such as node_types/standalone_machine.nix, or its bare name
	Arch         string `yaml:"arch,omitempty"`           // such as x86_64-linux
	SecretMaxAge string `yaml:"secret_max_age,omitempty"` // such as 365d: secrets that are older should be rotated
	CloseSSH     bool   `yaml:"close_ssh,omitempty"`      // port 22 is open to nobody but through the agent's tunnels
}

// NodeSettings are one node's.
type NodeSettings struct {
	NixOSVersion string   `yaml:"nixos_version,omitempty"`
	StateVersion string   `yaml:"state_version,omitempty"`
	NodeModule   string   `yaml:"node_module,omitempty"`
	Arch         string   `yaml:"arch,omitempty"`
	Tags         []string `yaml:"tags,omitempty,flow"`
	IPv4         string   `yaml:"ipv4,omitempty"`       // its public address, for the placeholders
	OverlayIP    string   `yaml:"overlay_ip,omitempty"` // its address in the overlay network of its cluster, where its agent does not tell it
	SSH          string   `yaml:"ssh,omitempty"`        // [user@]host[:port], where SSH reaches it otherwise than its provider says
	CloseSSH     *bool    `yaml:"close_ssh,omitempty"`
	TestDir      string   `yaml:"test_dir,omitempty"` // folder of the test that it is under: see TreeRequest.TestDir
}

// header opens every settings file that this program makes.
const header = `# The settings of this nix-infra project.
#
#   fleet         what this fleet is called
#   controllers   where its nodes and operators meet, in order of preference:
#                 tls://host:4222, and wss://host:443 for networks that let nothing else out
#   defaults      nixos_version, state_version, node_module and arch of every node; state_version is what
#                 system.stateVersion keeps: upgrade-nixos sets it to the version before the upgrade;
#                 close_ssh: true closes port 22 of enrolled nodes to all but nix-infra ssh
#   rollout       how a deployment reaches its nodes, where the flags don't say: canary, batch, order,
#                 max_unavailable, max_failures, on_failure, soak, at, window (see nix-infra deploy --help)
#   cache         the binary cache that deploy --build=local pushes to (push) and nodes pull from (pull, keys)
#   secrets       by name: max_age, such as 90d, from when on it is due to be rotated (defaults.secret_max_age
#                 is that of all), and generate, the bytes of randomness of its new value
#   cluster       of a cluster: its id (uuid), control_nodes, and service_groups by node; init-ctrl and init-node
#                 write them
#   agent         module: inject puts the agent's NixOS module into each node's tree, own leaves that to the project;
#                 without it, that is told from the project's files
#   ssh_key       name of the key pair below ssh/
#   provision     what nix-infra provision makes machines with, where the flags don't say: provider, location,
#                 machine_type, image, placement_group, networks, firewalls, labels, method (infect,
#                 nixos-anywhere or none), infect (commit and sha256 of the conversion script), jump (hosts that
#                 SSH goes through)
#   nodes         by name, what differs from the defaults, and: tags, ipv4, overlay_ip, ssh ([user@]host[:port])
`

func readSettings(dir string) (Settings, error) {
	text, err := os.ReadFile(filepath.Join(dir, SettingsFile))
	if errors.Is(err, fs.ErrNotExist) {
		s := Settings{}
		s.fill()
		return s, fmt.Errorf("%s has no %s: %w; run `nix-infra init` there", dir, SettingsFile, ErrNotInitialised)
	} else if err != nil {
		return Settings{}, err
	}
	return parseSettings(text)
}

// parseSettings reports every mistake with its line.
func parseSettings(text []byte) (Settings, error) {
	var s Settings
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	if err := d.Decode(&s); err != nil && !errors.Is(err, io.EOF) {
		return Settings{}, yamlError(SettingsFile, err)
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return Settings{}, fmt.Errorf("%s: more than one document: remove the --- line and what follows it", SettingsFile)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return Settings{}, yamlError(SettingsFile, err)
	}
	var errs []error
	for _, m := range s.mistakes() {
		errs = append(errs, fmt.Errorf("%s:%d: %w", SettingsFile, lineOf(&doc, m.path), m))
	}
	s.fill()
	return s, errors.Join(errs...)
}

func (s *Settings) fill() {
	s.Defaults.Arch = firstOf(s.Defaults.Arch, DefaultArch)
	s.SSHKey = firstOf(s.SSHKey, DefaultSSHKey)
}

// Node gives what holds for a node: its own settings over the defaults.
func (s Settings) Node(name string) NodeSettings {
	n := s.Nodes[name]
	n.NixOSVersion = firstOf(n.NixOSVersion, s.Defaults.NixOSVersion)
	n.StateVersion = firstOf(n.StateVersion, s.Defaults.StateVersion)
	n.NodeModule = firstOf(n.NodeModule, s.Defaults.NodeModule)
	n.Arch = firstOf(n.Arch, s.Defaults.Arch, DefaultArch)
	if n.CloseSSH == nil {
		n.CloseSSH = &s.Defaults.CloseSSH
	}
	return n
}

// Validate reports every mistake, a line each. No controllers is none: a project may have to wait for its
// first one.
func (s Settings) Validate() error {
	var errs []error
	for _, m := range s.mistakes() {
		errs = append(errs, fmt.Errorf("%s: %w", SettingsFile, m))
	}
	return errors.Join(errs...)
}

// mistake is one, and where in the document.
type mistake struct {
	path []string
	error
}

func (m mistake) Unwrap() error { return m.error }

func (s Settings) mistakes() []mistake {
	var found []mistake
	add := func(err error, path ...string) {
		if err != nil {
			found = append(found, mistake{path, fmt.Errorf("%s: %w", strings.Join(path, "."), err)})
		}
	}
	if s.Fleet == "" {
		add(errors.New("missing; say what this fleet is called, such as fleet: home"), "fleet")
	} else {
		add(protocol.CheckName(s.Fleet), "fleet")
	}
	for i, url := range s.Controllers {
		add(protocol.CheckControllers([]string{url}), "controllers", fmt.Sprint(i))
		if slices.Contains(s.Controllers[:i], url) {
			add(fmt.Errorf("%s is listed twice", url), "controllers", fmt.Sprint(i))
		}
	}
	d := s.Defaults
	add(validVersion(d.NixOSVersion), "defaults", "nixos_version")
	add(validVersion(d.StateVersion), "defaults", "state_version")
	add(validModule(d.NodeModule), "defaults", "node_module")
	add(validArch(d.Arch), "defaults", "arch")
	add(validMaxAge(d.SecretMaxAge), "defaults", "secret_max_age")
	s.Rollout.mistakes(func(err error, words ...string) { add(err, append([]string{"rollout"}, words...)...) })
	s.Cache.mistakes(func(err error, words ...string) { add(err, append([]string{"cache"}, words...)...) })
	s.Cluster.mistakes(func(err error, words ...string) { add(err, append([]string{"cluster"}, words...)...) })
	for _, name := range slices.Sorted(maps.Keys(s.Secrets)) {
		add(protocol.CheckSecretName(name), "secrets", name)
		add(validMaxAge(s.Secrets[name].MaxAge), "secrets", name, "max_age")
		add(validGenerate(s.Secrets[name].Generate), "secrets", name, "generate")
	}
	add(validKeyName(s.SSHKey), "ssh_key")
	add(s.Agent.check(), "agent", "module")
	s.Provision.mistakes(func(err error, words ...string) { add(err, append([]string{"provision"}, words...)...) })
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		n := s.Nodes[name]
		add(ValidNodeName(name), "nodes", name)
		add(validVersion(n.NixOSVersion), "nodes", name, "nixos_version")
		add(validVersion(n.StateVersion), "nodes", name, "state_version")
		add(validModule(n.NodeModule), "nodes", name, "node_module")
		add(validArch(n.Arch), "nodes", name, "arch")
		add((&protocol.TagsRequest{Tags: n.Tags}).Validate(), "nodes", name, "tags")
		add(validIPv4(n.IPv4), "nodes", name, "ipv4")
		add(validIPv4(n.OverlayIP), "nodes", name, "overlay_ip")
		add(validTestDir(n.TestDir), "nodes", name, "test_dir")
		add(validSSHAddress(n.SSH), "nodes", name, "ssh")
	}
	return found
}

var (
	versionForm = regexp.MustCompile(`^[0-9a-z][0-9a-z.-]{0,31}$`)
	archForm    = regexp.MustCompile(`^[a-z0-9_]{1,32}-linux$`)
	keyNameForm = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._@+-]{0,127}$`)
)

// The empty string is no mistake of the following: it stands for the default.

func validVersion(v string) error {
	if v != "" && !versionForm.MatchString(v) {
		return fmt.Errorf("%q is no NixOS version; expected such as 25.11", v)
	}
	return nil
}

func validArch(a string) error {
	if a != "" && !archForm.MatchString(a) {
		return fmt.Errorf("%q is no system of Nix that NixOS runs on; expected such as x86_64-linux or aarch64-linux", a)
	}
	return nil
}

func validModule(m string) error {
	if m != "" && (!filepath.IsLocal(m) || path.Clean(m) != strings.TrimPrefix(m, "./") || strings.ContainsAny(m, "\\\n\r\x00")) {
		return fmt.Errorf("%q is no path below the project; expected such as node_types/cluster_node.nix", m)
	}
	return nil
}

func validTestDir(dir string) error {
	if strings.ContainsAny(dir, "\n\r\x00") {
		return fmt.Errorf("%q is no folder; expected such as __test__/hello", dir)
	}
	return nil
}

func validKeyName(k string) error {
	if k != "" && !keyNameForm.MatchString(k) {
		return fmt.Errorf("%q is no file name of a key below ssh/", k)
	}
	return nil
}

func validIPv4(ip string) error {
	if ip == "" {
		return nil
	}
	if a, err := netip.ParseAddr(ip); err != nil || !a.Is4() {
		return fmt.Errorf("%q is no IPv4 address", ip)
	}
	return nil
}

// WriteSettings replaces nix-infra.yaml in one step. Comments that people wrote into it stay with the
// keys that they belong to.
func WriteSettings(dir string, s Settings) error {
	if err := s.Validate(); err != nil {
		return err
	}
	if s.Controllers == nil {
		s.Controllers = []string{} // shown, as the place where they go
	}
	file := filepath.Join(dir, SettingsFile)
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	text, err := encodeSettings(s, old)
	if err != nil {
		return fmt.Errorf("%s: %w", SettingsFile, err)
	}
	return atomicfile.Write(file, text, 0o644)
}

func encodeSettings(s Settings, old []byte) ([]byte, error) {
	var content, doc yaml.Node
	if err := content.Encode(s); err != nil {
		return nil, err
	}
	plain, err := encodeYAML(&content)
	plain = append([]byte(header), plain...)
	if err != nil || yaml.Unmarshal(old, &doc) != nil || len(doc.Content) != 1 {
		return plain, err
	}
	keepComments(doc.Content[0], &content)
	doc.Content[0] = &content
	text, err := encodeYAML(&doc)
	if err != nil {
		return plain, nil
	}
	// Comments in odd places can confuse the encoder; settings that mean the same count more than they.
	before, beforeErr := parseSettings(plain)
	after, afterErr := parseSettings(text)
	if afterErr != nil || beforeErr == nil && !reflect.DeepEqual(before, after) {
		return plain, nil
	}
	return text, nil
}

func encodeYAML(n *yaml.Node) ([]byte, error) {
	var text bytes.Buffer
	e := yaml.NewEncoder(&text)
	e.SetIndent(2)
	err := errors.Join(e.Encode(n), e.Close())
	return text.Bytes(), err
}
