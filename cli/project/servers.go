package project

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// ServersFile is the name of the inventory below the project folder.
const ServersFile = "servers.yaml"

// Server is one entry of servers.yaml: a machine that its owner has already.
type Server struct {
	Name        string
	IP          string // address or host name; "" where Provider knows it
	Provider    string // "" or "hetzner"
	SSHKey      string // path of the private key, absolute or below the project
	Username    string // to log in as
	Description string
	Metadata    map[string]any
	Line        int // in servers.yaml
}

type serverEntry struct {
	IP          string         `yaml:"ip"`
	Provider    string         `yaml:"provider"`
	SSHKey      string         `yaml:"ssh_key"`
	Username    string         `yaml:"username"`
	Description string         `yaml:"description"`
	Metadata    map[string]any `yaml:"metadata"`
}

// Servers reads servers.yaml, in its order. No such file is an empty list. Keys that it does not know are
// ignored, as other tools keep theirs there; every mistake is reported with its line.
func (p *Project) Servers() ([]Server, error) { return p.servers() }

func (p *Project) readServers() ([]Server, error) {
	text, err := os.ReadFile(filepath.Join(p.Dir, ServersFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	return parseServers(text)
}

func parseServers(text []byte) ([]Server, error) {
	var doc struct {
		Servers yaml.Node `yaml:"servers"`
	}
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, yamlError(ServersFile, err)
	}
	all := doc.Servers
	switch {
	case all.IsZero():
		return nil, fmt.Errorf("%s:1: the key servers is missing; expected servers: with an entry for each machine below it", ServersFile)
	case all.Kind == yaml.ScalarNode && all.Tag == "!!null":
		return nil, nil
	case all.Kind != yaml.MappingNode:
		return nil, fmt.Errorf("%s:%d: servers: expected machines by name", ServersFile, all.Line)
	}
	var servers []Server
	var errs []error
	lines := map[string]int{}
	for i := 0; i+1 < len(all.Content); i += 2 {
		key, value := all.Content[i], all.Content[i+1]
		if first, ok := lines[key.Value]; ok {
			errs = append(errs, fmt.Errorf("%s:%d: %s: listed before, at line %d", ServersFile, key.Line, key.Value, first))
			continue
		}
		lines[key.Value] = key.Line
		s, err := parseServer(key, value)
		errs = append(errs, err)
		servers = append(servers, s)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return servers, nil
}

func parseServer(key, value *yaml.Node) (Server, error) {
	name := key.Value
	var e serverEntry
	if value.Kind != yaml.MappingNode && value.Kind != yaml.AliasNode {
		return Server{}, fmt.Errorf("%s:%d: %s: expected ip or provider, and ssh_key, below the name", ServersFile, key.Line, show(name))
	}
	if err := value.Decode(&e); err != nil {
		return Server{}, yamlError(ServersFile, err)
	}
	var errs []error
	fail := func(field, format string, args ...any) {
		line := key.Line
		if field != "" {
			line = max(line, lineOf(value, []string{field}))
		}
		errs = append(errs, fmt.Errorf("%s:%d: %s: %s", ServersFile, line, show(name), fmt.Sprintf(format, args...)))
	}
	if err := ValidNodeName(name); err != nil {
		fail("", "%v", err)
	}
	switch {
	case e.IP == "" && e.Provider == "":
		fail("", "ip is missing, or provider where a cloud knows the address")
	case e.IP != "" && e.Provider != "":
		fail("provider", "ip and provider are both there; keep one")
	case e.Provider != "" && e.Provider != "hetzner":
		fail("provider", "provider %q is not known; the only one is hetzner", e.Provider)
	case e.IP != "" && !isHost(e.IP):
		fail("ip", "ip %q is neither an address nor a host name", e.IP)
	}
	if e.SSHKey == "" {
		fail("ssh_key", "ssh_key is missing; give the path of the private key, such as ssh/%s", DefaultSSHKey)
	}
	if strings.ContainsAny(e.Username, " \t\n:@/\x00") || strings.HasPrefix(e.Username, "-") {
		fail("username", "username %q is no user name", e.Username)
	}
	return Server{
		Name: name, IP: e.IP, Provider: e.Provider, SSHKey: e.SSHKey, Username: firstOf(e.Username, "root"),
		Description: e.Description, Metadata: e.Metadata, Line: key.Line,
	}, errors.Join(errs...)
}

var (
	hostForm    = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$`)
	numbersOnly = regexp.MustCompile(`^[0-9.]+$`)
)

// isHost tells whether s is an address or a DNS name; 300.1.1.1 is a slip and not a name.
func isHost(s string) bool {
	if _, err := netip.ParseAddr(s); err == nil {
		return true
	}
	return hostForm.MatchString(s) && !numbersOnly.MatchString(s) && !strings.Contains(s, "..")
}
