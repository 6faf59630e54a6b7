package hetzner

import (
	"bytes"
	"context"
	"fmt"

	"github.com/hetznercloud/hcloud-go/v2/hcloud"
	"golang.org/x/crypto/ssh"

	"github.com/nix-infra/nix-infra/cli/provision"
)

// findKey finds a public key there, under whatever name: the API has each key once. It is nil where it is not there; its
// name may be taken by another one.
func (h *Hetzner) findKey(ctx context.Context, k provision.SSHKey) (*hcloud.SSHKey, error) {
	if k.PublicKey == "" {
		return nil, fmt.Errorf("SSH key %s: its public half, which new machines are to let in, is missing; nix-infra ssh-key create --name %s makes it", k.Name, k.Name)
	}
	wanted, err := parseKey(k.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("SSH key %s: %w", k.Name, err)
	}
	all, err := h.api.SSHKey.All(ctx)
	if err != nil {
		return nil, explain("list SSH keys", err)
	}
	taken := false
	for _, there := range all {
		if key, err := parseKey(there.PublicKey); err == nil && bytes.Equal(key, wanted) {
			return there, nil
		}
		taken = taken || there.Name == k.Name
	}
	if taken {
		return nil, fmt.Errorf("hetzner: there is another SSH key called %s; if nobody needs it, remove it with nix-infra ssh-key remove --name %s, or give yours another name below ssh/", k.Name, k.Name)
	}
	return nil, nil
}

func parseKey(line string) ([]byte, error) {
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return nil, fmt.Errorf("its public half is no key: %w", err)
	}
	return key.Marshal(), nil
}

// ensureKey has a key there, and says whether it is new.
func (h *Hetzner) ensureKey(ctx context.Context, k provision.SSHKey) (*hcloud.SSHKey, bool, error) {
	there, err := h.findKey(ctx, k)
	if err != nil || there != nil {
		return there, false, err
	}
	made, _, err := h.api.SSHKey.Create(ctx, hcloud.SSHKeyCreateOpts{Name: k.Name, PublicKey: k.PublicKey, Labels: map[string]string{FleetLabel: h.fleet}})
	if hcloud.IsError(err, hcloud.ErrorCodeUniquenessError) { // somebody else, or a request of ours whose answer was lost
		if there, lookErr := h.findKey(ctx, k); lookErr == nil && there != nil {
			return there, false, nil
		}
	}
	if err != nil {
		return nil, false, explain("add SSH key "+k.Name, err)
	}
	return made, true, nil
}

// AddKey keeps a public key.
func (h *Hetzner) AddKey(ctx context.Context, k provision.SSHKey) (bool, error) {
	_, added, err := h.ensureKey(ctx, k)
	return added, err
}

// RemoveKey forgets a public key by its name. Machines that let it in go on doing so.
func (h *Hetzner) RemoveKey(ctx context.Context, name string) (bool, error) {
	there, _, err := h.api.SSHKey.GetByName(ctx, name)
	if err != nil {
		return false, explain("SSH key "+name, err)
	}
	if there == nil {
		return false, nil
	}
	if _, err := h.api.SSHKey.Delete(ctx, there); err != nil && !hcloud.IsError(err, hcloud.ErrorCodeNotFound) {
		return false, explain("remove SSH key "+name, err)
	}
	return true, nil
}
