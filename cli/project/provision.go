package project

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Provision is how machines are made and brought in, where the flags of nix-infra provision don't say. What is empty is
// not said.
type Provision struct {
	Provider       string            `yaml:"provider,omitempty"`        // hetzner or self-hosted; "": what the project has tells
	Location       string            `yaml:"location,omitempty"`        // such as hel1
	MachineType    string            `yaml:"machine_type,omitempty"`    // such as cpx22
	Image          string            `yaml:"image,omitempty"`           // such as debian-12
	PlacementGroup string            `yaml:"placement_group,omitempty"` // made where it is missing
	Networks       []string          `yaml:"networks,omitempty,flow"`   // of the provider, by name
	Firewalls      []string          `yaml:"firewalls,omitempty,flow"`  // of the provider, by name
	Labels         map[string]string `yaml:"labels,omitempty"`          // beside those by which the fleet's own machines are known
	Method         Method            `yaml:"method,omitempty"`          // how a machine becomes a NixOS machine
	Infect         Infect            `yaml:"infect,omitempty"`          // the conversion script
	Jump           string            `yaml:"jump,omitempty"`            // the hosts that SSH goes through, as ssh -J takes them
}

// Method is how a machine becomes a NixOS machine.
type Method string

const (
	MethodInfect   Method = "infect"         // by a script on the machine, which keeps its disk
	MethodAnywhere Method = "nixos-anywhere" // by that program on this machine, which writes its disk anew
	MethodNone     Method = "none"           // not at all: it is one
)

// Methods are all of them, the default first.
var Methods = []Method{MethodInfect, MethodAnywhere, MethodNone}

// Infect says which conversion script is used: the file nixos-infect of a commit of its repository, and what that file
// hashes to.
type Infect struct {
	Commit string `yaml:"commit,omitempty"` // 40 hexadecimal digits
	SHA256 string `yaml:"sha256,omitempty"` // 64 hexadecimal digits
}

// DefaultInfect is the script that is meant where a project names none.
var DefaultInfect = Infect{
	Commit: "7563801d3ae68c975e4027f4e31a3906dca95f30",
	SHA256: "4cc3b5f8e4333ab4f02906d80a836c1b36e2887a51abf4eba4d9113b33934393",
}

// Pinned is the script that the project means.
func (i Infect) Pinned() Infect {
	if i.Commit == "" && i.SHA256 == "" {
		return DefaultInfect
	}
	return Infect{firstOf(i.Commit, DefaultInfect.Commit), firstOf(i.SHA256, DefaultInfect.SHA256)}
}

var (
	commitForm     = regexp.MustCompile(`^[0-9a-f]{40}$`)
	sha256Form     = regexp.MustCompile(`^[0-9a-f]{64}$`)
	providerWord   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	labelKeyForm   = regexp.MustCompile(`^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)
	labelValueForm = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$`)
)

// Providers are what --provider takes.
var Providers = []string{"hetzner", "self-hosted"}

// ownLabels open the labels by which machines of a fleet are known.
const ownLabels = "nix-infra/"

func (p Provision) mistakes(add func(err error, words ...string)) {
	if p.Provider != "" && !slices.Contains(Providers, p.Provider) {
		add(fmt.Errorf("%q is not known; use %s", p.Provider, strings.Join(Providers, " or ")), "provider")
	}
	add(validProviderWord(p.Location), "location")
	add(validProviderWord(p.MachineType), "machine_type")
	add(validProviderWord(p.Image), "image")
	add(validProviderWord(p.PlacementGroup), "placement_group")
	for i, n := range p.Networks {
		add(validProviderWord(n), "networks", strconv.Itoa(i))
	}
	for i, f := range p.Firewalls {
		add(validProviderWord(f), "firewalls", strconv.Itoa(i))
	}
	for _, key := range slices.Sorted(maps.Keys(p.Labels)) {
		add(ValidLabel(key, p.Labels[key]), "labels", key)
	}
	if p.Method != "" {
		add(ValidMethod(p.Method), "method")
	}
	if c := p.Infect.Commit; c != "" && !commitForm.MatchString(c) {
		add(fmt.Errorf("%q is no commit; expected its 40 hexadecimal digits: a branch or tag can change", c), "infect", "commit")
	} else if c != "" && c != DefaultInfect.Commit && p.Infect.SHA256 == "" {
		add(errors.New("sha256 is missing beside it; give what sha256sum says of the file nixos-infect of that commit"), "infect", "commit")
	}
	if h := p.Infect.SHA256; h != "" && !sha256Form.MatchString(h) {
		add(fmt.Errorf("%q is no SHA-256; expected 64 hexadecimal digits", h), "infect", "sha256")
	}
	if p.Jump != "" {
		_, err := ParseJump(p.Jump)
		add(err, "jump")
	}
}

func validProviderWord(w string) error {
	if w != "" && !providerWord.MatchString(w) {
		return fmt.Errorf("%q is no name or number at a provider", w)
	}
	return nil
}

// ValidLabel tells whether a machine may have that label.
func ValidLabel(key, value string) error {
	switch {
	case strings.HasPrefix(key, ownLabels):
		return fmt.Errorf("label %q: what begins with %s is set by nix-infra itself", key, ownLabels)
	case !labelKeyForm.MatchString(key):
		return fmt.Errorf("label %q: expected up to 63 letters, digits and . _ -, beginning and ending with a letter or digit", key)
	case !labelValueForm.MatchString(value):
		return fmt.Errorf("label %s: value %q: expected up to 63 letters, digits and . _ -, beginning and ending with a letter or digit", key, value)
	}
	return nil
}

// ValidMethod tells whether there is that method.
func ValidMethod(m Method) error {
	if !slices.Contains(Methods, m) {
		return fmt.Errorf("%q is not known; use infect, nixos-anywhere or none", m)
	}
	return nil
}

// SSHAddress is how SSH reaches a machine.
type SSHAddress struct {
	User string // "": not said
	Host string
	Port int // 0: not said
}

// ParseSSHAddress reads [user@]host[:port]; an IPv6 address with a port stands in brackets.
func ParseSSHAddress(s string) (SSHAddress, error) {
	var a SSHAddress
	wrong := fmt.Errorf("%q: expected [user@]host[:port]", s)
	a.Host = s
	if user, host, ok := strings.Cut(s, "@"); ok {
		if a.User, a.Host = user, host; user == "" || strings.HasPrefix(user, "-") {
			return SSHAddress{}, wrong
		}
	}
	if host, port, err := net.SplitHostPort(a.Host); err == nil {
		if a.Port, err = strconv.Atoi(port); err != nil || a.Port < 1 || a.Port > 65535 {
			return SSHAddress{}, fmt.Errorf("%q: port %q is not a number from 1 to 65535", s, port)
		}
		a.Host = host
	}
	a.Host = strings.TrimSuffix(strings.TrimPrefix(a.Host, "["), "]")
	if a.Host == "" || strings.HasPrefix(a.Host, "-") || strings.ContainsAny(s, " \t\r\n\x00/'\"") {
		return SSHAddress{}, wrong
	}
	return a, nil
}

// maxJumps is how many hosts SSH may go through.
const maxJumps = 8

// ParseJump reads the hosts that SSH goes through, from the first: separated by commas, as ssh -J takes them.
func ParseJump(s string) ([]SSHAddress, error) {
	var jumps []SSHAddress
	for _, word := range strings.Split(s, ",") {
		a, err := ParseSSHAddress(word)
		if err != nil {
			return nil, err
		}
		jumps = append(jumps, a)
	}
	if len(jumps) > maxJumps {
		return nil, fmt.Errorf("%d hosts, one after the other; up to %d are possible", len(jumps), maxJumps)
	}
	return jumps, nil
}

func validSSHAddress(s string) error {
	if s == "" {
		return nil
	}
	_, err := ParseSSHAddress(s)
	return err
}
