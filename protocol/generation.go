package protocol

import (
	"fmt"
	"time"
)

// Generation is one of a node's system profile.
type Generation struct {
	Number     int       `json:"number"`
	Closure    string    `json:"closure"` // store path
	Created    time.Time `json:"created"`
	NixOS      string    `json:"nixos,omitempty"` // nixos-version of the closure
	Running    bool      `json:"running,omitempty"`
	Booted     bool      `json:"booted,omitempty"`
	Current    bool      `json:"current,omitempty"`    // what boots next
	Deployment string    `json:"deployment,omitempty"` // the last one that confirmed this closure, as far as the agent remembers
	Quarantine string    `json:"quarantine,omitempty"` // why it was rolled back from
}

// GenerationList answers ListGenerations, the newest first, with the systems that are no generation (any more) but
// run or are in quarantine at the end, under number 0.
type GenerationList struct {
	Generations []Generation `json:"generations"`
}

// GarbageRequest is CollectGarbage's. What runs, what was and will be booted, what the next rollback would go to and
// what is in quarantine stays, whatever it says.
type GarbageRequest struct {
	OlderThan int64 `json:"older_than,omitempty"` // seconds; generations younger than that stay
	Keep      int   `json:"keep,omitempty"`       // so many of the newest generations stay
	DryRun    bool  `json:"dry_run,omitempty"`    // only say which generations would go
}

// Validate checks the request's form.
func (r *GarbageRequest) Validate() error {
	if r.OlderThan < 0 || r.Keep < 0 {
		return fmt.Errorf("can't keep %d generations younger than %d s", r.Keep, r.OlderThan)
	}
	return nil
}

// GarbageReport answers CollectGarbage.
type GarbageReport struct {
	Removed []Generation `json:"removed"`
	Kept    int          `json:"kept"`  // generations
	Paths   int          `json:"paths"` // store paths that were deleted; 0 in a dry run
	Freed   int64        `json:"freed"` // bytes
}

// FileList answers OwnFiles.
type FileList struct {
	Files map[string][]byte `json:"files"` // content by name
}
