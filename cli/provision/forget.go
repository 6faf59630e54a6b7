package provision

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// ForgetNode takes a machine's host key out of the pinned ones, by the node's name and by the address that it had ("":
// none): the next machine of either is another one.
func ForgetNode(file, node, address string) error {
	pinning.Lock()
	defer pinning.Unlock()
	pinned, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	names := []string{NodeAlias(node)}
	if address != "" {
		names = append(names, knownhosts.Normalize(address))
	}
	var kept strings.Builder
	for line := range strings.Lines(string(pinned)) {
		hosts, _, _ := strings.Cut(line, " ")
		if !slices.Contains(names, hosts) {
			kept.WriteString(line)
		}
	}
	if kept.Len() == len(pinned) {
		return nil
	}
	return atomicfile.Write(file, []byte(kept.String()), 0o644)
}
