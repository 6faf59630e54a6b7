package project

import (
	"fmt"
	"strings"

	"github.com/nix-infra/nix-infra/protocol"
)

// Cache is the binary cache that systems go through which are not built on their nodes. URLs are as Nix takes them,
// with their scheme: file, http, https, s3, ssh or ssh-ng.
type Cache struct {
	Push string   `yaml:"push,omitempty"`      // where systems that are built here go; "": there is none
	Pull []string `yaml:"pull,omitempty"`      // where nodes get them, in order of preference; none: from Push, unless that is a folder
	Keys []string `yaml:"keys,omitempty,flow"` // public keys as Nix has them, "name:base64": nodes believe what one of them signed
}

// Pulls is where nodes get systems from: Pull or, where that says nothing, Push, unless it is a folder of this
// machine.
func (c Cache) Pulls() []string {
	if len(c.Pull) > 0 || c.Push == "" || strings.HasPrefix(c.Push, "file:") {
		return c.Pull
	}
	return []string{c.Push}
}

func (c Cache) mistakes(add func(err error, words ...string)) {
	if c.Push != "" {
		add(protocol.CheckCache(c.Push), "push")
	}
	for i, url := range c.Pull {
		add(protocol.CheckCache(url), "pull", fmt.Sprint(i))
	}
	for i, key := range c.Keys {
		add(protocol.CheckCacheKey(key), "keys", fmt.Sprint(i))
	}
}
