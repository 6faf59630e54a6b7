package project

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

// SecretSettings are one secret's.
type SecretSettings struct {
	MaxAge   string `yaml:"max_age,omitempty"`  // such as 90d: it should be rotated when it is older
	Generate int    `yaml:"generate,omitempty"` // bytes of randomness of a new value; 0: it can't be made up
}

// How much randomness a generated secret may have, in bytes.
const (
	MinGenerate = 16
	MaxGenerate = 1024
)

// SecretMaxAge is when a secret is due to be rotated, 0: never.
func (s Settings) SecretMaxAge(name string) time.Duration {
	d, _ := ParseAge(firstOf(s.Secrets[name].MaxAge, s.Defaults.SecretMaxAge)) // the settings were checked
	return d
}

// ParseAge reads a duration that may be in days or weeks.
func ParseAge(s string) (time.Duration, error) {
	units := map[byte]time.Duration{'d': 24 * time.Hour, 'w': 7 * 24 * time.Hour}
	if n := len(s) - 1; n > 0 && units[s[n]] > 0 {
		count, err := strconv.ParseUint(s[:n], 10, 16)
		if err == nil && time.Duration(count) <= math.MaxInt64/units[s[n]] {
			return time.Duration(count) * units[s[n]], nil
		}
	} else if d, err := time.ParseDuration(s); err == nil && d >= 0 && d%time.Second == 0 {
		return d, nil
	}
	return 0, fmt.Errorf("%q is no age; use such as 14d, 2w or 12h", s)
}

func validMaxAge(s string) error {
	if s == "" {
		return nil
	}
	_, err := ParseAge(s)
	return err
}

func validGenerate(n int) error {
	if n != 0 && (n < MinGenerate || n > MaxGenerate) {
		return fmt.Errorf("%d bytes; %d to %d are possible", n, MinGenerate, MaxGenerate)
	}
	return nil
}

// SecretUse is a secret that a node's file names.
type SecretUse struct {
	Name     string
	PreBuild bool   // a build of the node's system needs it
	At       string // file:line, where it is first named
}

// Secrets lists the secrets that a node's own file names, sorted by name. testDir is as in TreeRequest. Placeholders of
// secrets that name none are for Tree to complain of.
func (p *Project) Secrets(node, testDir string) ([]SecretUse, error) {
	c, err := p.newComposer(TreeRequest{Node: node, TestDir: testDir})
	if err != nil {
		return nil, err
	}
	f, where, err := c.nodeFile()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var uses []SecretUse
	fill(f.Data, func(line int, _ []byte, key string) (string, bool) {
		rest, preBuild := strings.CutPrefix(key, preBuildPrefix)
		if !preBuild {
			var ok bool
			if rest, ok = strings.CutPrefix(key, secretPrefix); !ok {
				return "", false
			}
		}
		name, err := secretName(rest)
		if err != nil {
			return "", false
		}
		if i := slices.IndexFunc(uses, func(u SecretUse) bool { return u.Name == name }); i >= 0 {
			uses[i].PreBuild = uses[i].PreBuild || preBuild
		} else {
			uses = append(uses, SecretUse{name, preBuild, fmt.Sprintf("%s:%d", show(where), line)})
		}
		return "", false
	})
	slices.SortFunc(uses, func(a, b SecretUse) int { return strings.Compare(a.Name, b.Name) })
	return uses, nil
}

// NodeFiles lists the nodes that have a file of their own in nodes/, sorted.
func (p *Project) NodeFiles() ([]string, error) {
	src, err := newSource(p.Dir, "")
	if err != nil {
		return nil, err
	}
	files, err := src.walk("nodes")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, f := range files {
		name, ok := strings.CutSuffix(path.Base(f.Path), ".nix")
		if ok && path.Dir(f.Path) == "nodes" && ValidNodeName(name) == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// secretName is the name in a placeholder of a secret; only the last element of the path counts.
func secretName(rest string) (string, error) {
	name := path.Base(rest)
	if strings.HasSuffix(rest, "/") || !keyNameForm.MatchString(name) {
		return "", errors.New("this names no secret; use letters, digits and . _ @ + -, the first a letter, digit or _")
	}
	return name, nil
}

// Value fills in the placeholders of a secret's value for a node: those of the node's own file, but for other secrets,
// since one could then not be rotated without the other. Values that have none are given back as they are.
func (p *Project) Value(r TreeRequest, value []byte) ([]byte, error) {
	if !placeholder.Match(value) {
		return value, nil
	}
	filled, err := p.Fill(r, string(value), nil)
	return bytes.Clone([]byte(filled)), err
}
