package hetzner

import (
	"bytes"
	"net/http"
	"net/url"
	"slices"

	"github.com/hetznercloud/hcloud-go/v2/hcloud/schema"
	"golang.org/x/crypto/ssh"
)

func (f *Fake) listKeys(query url.Values) (answer, *refusal) {
	keys := slices.Clone(f.keys)
	if query.Has("fingerprint") {
		keys = slices.DeleteFunc(keys, func(k schema.SSHKey) bool { return k.Fingerprint != query.Get("fingerprint") })
	}
	return list(f, query, "ssh_keys", keys, func(k schema.SSHKey) (string, map[string]string) { return k.Name, k.Labels })
}

func (f *Fake) createKey(r schema.SSHKeyCreateRequest) (answer, *refusal) {
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(r.PublicKey))
	switch {
	case r.Name == "":
		return answer{}, invalid("name", "is too short")
	case err != nil:
		return answer{}, invalid("public_key", "is not a valid SSH key")
	}
	for _, k := range f.keys {
		have, _, _, _, err := ssh.ParseAuthorizedKey([]byte(k.PublicKey))
		switch {
		case err == nil && bytes.Equal(have.Marshal(), key.Marshal()):
			return answer{}, taken("public_key", "SSH key with the same fingerprint already exists")
		case k.Name == r.Name:
			return answer{}, taken("name", "SSH key not unique")
		}
	}
	made := schema.SSHKey{ID: f.id(), Name: r.Name, PublicKey: r.PublicKey, Fingerprint: ssh.FingerprintLegacyMD5(key), Labels: labelsOf(r.Labels), Created: f.now}
	if err := checkLabels(made.Labels); err != nil {
		return answer{}, err
	}
	f.keys = append(f.keys, made)
	return answer{http.StatusCreated, schema.SSHKeyCreateResponse{SSHKey: made}}, nil
}

func (f *Fake) deleteKey(id int64) (answer, *refusal) {
	before := len(f.keys)
	f.keys = slices.DeleteFunc(f.keys, func(k schema.SSHKey) bool { return k.ID == id })
	if len(f.keys) == before {
		return answer{}, notFound("ssh_key")
	}
	return answer{status: http.StatusNoContent}, nil
}

// groupsShown are the placement groups with the servers that are in them.
func (f *Fake) groupsShown() []schema.PlacementGroup {
	var shown []schema.PlacementGroup
	for _, g := range f.groups {
		g.Servers = []int64{}
		for _, s := range f.servers {
			if s.group == g.ID {
				g.Servers = append(g.Servers, s.ID)
			}
		}
		shown = append(shown, g)
	}
	return shown
}

func (f *Fake) listGroups(query url.Values) (answer, *refusal) {
	return list(f, query, "placement_groups", f.groupsShown(), func(g schema.PlacementGroup) (string, map[string]string) { return g.Name, g.Labels })
}

func (f *Fake) createGroup(r schema.PlacementGroupCreateRequest) (answer, *refusal) {
	switch {
	case r.Name == "":
		return answer{}, invalid("name", "is too short")
	case r.Type != "spread":
		return answer{}, invalid("type", "is not one of the allowed values")
	case slices.ContainsFunc(f.groups, func(g schema.PlacementGroup) bool { return g.Name == r.Name }):
		return answer{}, taken("name", "placement group name is already used")
	}
	made := schema.PlacementGroup{ID: f.id(), Name: r.Name, Type: r.Type, Labels: labelsOf(r.Labels), Created: f.now, Servers: []int64{}}
	if err := checkLabels(made.Labels); err != nil {
		return answer{}, err
	}
	f.groups = append(f.groups, made)
	return answer{http.StatusCreated, schema.PlacementGroupCreateResponse{PlacementGroup: made}}, nil
}

func labelsOf(labels *map[string]string) map[string]string {
	if labels == nil {
		return map[string]string{}
	}
	return *labels
}

func (f *Fake) listImages(query url.Values) (answer, *refusal) {
	have := slices.DeleteFunc(slices.Clone(images), func(i schema.Image) bool {
		return query.Has("architecture") && !slices.Contains(query["architecture"], i.Architecture) ||
			query.Has("type") && !slices.Contains(query["type"], i.Type) || i.Deprecation != nil && query.Get("include_deprecated") != "true"
	})
	return list(f, query, "images", have, func(i schema.Image) (string, map[string]string) { return *i.Name, i.Labels })
}
