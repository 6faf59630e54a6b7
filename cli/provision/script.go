package provision

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// InfectFile is the name of the conversion script, in its repository and in a project.
const InfectFile = "nixos-infect"

// InfectSource is where files of that repository are, by commit.
const InfectSource = "https://raw.githubusercontent.com/elitak/nixos-infect"

// maxScript is how large a conversion script may be, in bytes.
const maxScript = 1 << 20

// ScriptHash is the SHA-256 of a script, in hexadecimal digits.
func ScriptHash(script []byte) string {
	sum := sha256.Sum256(script)
	return hex.EncodeToString(sum[:])
}

// ReadScript reads a script, which has to have the hash want, unless that is empty.
func ReadScript(file, want string) ([]byte, error) {
	script, err := atomicfile.Read(file, maxScript)
	if err != nil {
		return nil, err
	}
	if len(script) == 0 {
		return nil, fmt.Errorf("%s is empty", file)
	}
	if got := ScriptHash(script); want != "" && got != want {
		return nil, fmt.Errorf("%s is not the pinned script: its SHA-256 is %s, and provision.infect.sha256 in %s, or the default, is %s", file, got, project.SettingsFile, want)
	}
	return script, nil
}

// FetchInfect downloads the pinned script from source, and gives nothing that has another hash.
func FetchInfect(ctx context.Context, source string, pinned project.Infect) ([]byte, error) {
	url := source + "/" + pinned.Commit + "/" + InfectFile
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, fmt.Errorf("fetch the conversion script: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetch the conversion script: %s says %s", url, response.Status)
	}
	script, err := io.ReadAll(io.LimitReader(response.Body, maxScript+1))
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", url, err)
	}
	if got := ScriptHash(script); got != pinned.SHA256 {
		return nil, fmt.Errorf("what %s gave is not the pinned script, and was thrown away: its SHA-256 is %s, the pinned one %s", url, got, pinned.SHA256)
	}
	return script, nil
}
