package reconcile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

const (
	journalVersion = 1
	journalFile    = "journal.json"
	manifestsDir   = "manifests"
	treesDir       = "tree"
	blobsDir       = "blobs"
	secretsDir     = "secrets"

	maxReports    = 64
	maxQuarantine = 256
	maxJournal    = 8 << 20 // bytes
)

// journal is all that survives a restart, one file. It is written before and after every step.
type journal struct {
	Version    int                   `json:"v"`
	Seen       uint64                `json:"seen"`             // highest serial that was accepted
	Newest     string                `json:"newest,omitempty"` // deployment of the manifest that had it
	State      State                 `json:"state"`
	History    []Confirmation        `json:"history,omitempty"`   // what was confirmed, oldest first
	Baseline   []string              `json:"baseline"`            // units that had failed before the last confirmed manifest; null: nothing was confirmed yet
	Installed  string                `json:"installed,omitempty"` // digest of the manifest whose files are in /etc/nixos
	Attempt    *attempt              `json:"attempt,omitempty"`   // under way
	Rotation   *rotation             `json:"rotation,omitempty"`  // under way
	Quarantine map[string]Quarantine `json:"quarantine"`          // by closure
	Reports    []protocol.Report     `json:"reports,omitempty"`   // not acknowledged yet, oldest first
}

// Quarantine is why a closure is not tried again.
type Quarantine struct {
	Reason     string    `json:"reason"`
	Deployment string    `json:"deployment"`
	Time       time.Time `json:"time"`
}

// attempt is a manifest on its way.
type attempt struct {
	Digest     string         `json:"digest"` // of the signed document in manifests/
	Serial     uint64         `json:"serial"`
	Deployment string         `json:"deployment"`
	Mode       protocol.Mode  `json:"mode"`
	Timeout    int            `json:"timeout"` // seconds
	Settle     int            `json:"settle"`  // seconds
	Phase      protocol.Phase `json:"phase"`
	Started    time.Time      `json:"started"`
	User       string         `json:"user,omitempty"` // who signed the manifest
	Role       protocol.Role  `json:"role,omitempty"`
	Built      bool           `json:"built"`
	Rollback   bool           `json:"rollback,omitempty"`
	Local      bool           `json:"local,omitempty"`   // ordered by root on the node itself, unsigned
	Offline    bool           `json:"offline,omitempty"` // it came from the node itself, with no controller to be reached: that is no part of the proof
	Staged     *attempt       `json:"staged,omitempty"`  // of a reboot: the staged attempt that it takes over
	Source     string         `json:"source,omitempty"`  // of a rollback or reboot: digest of the manifest whose files the new closure is made of, "": not known

	Old        string   `json:"old,omitempty"`         // closure that ran before
	OldProfile string   `json:"old_profile,omitempty"` // closure that the system profile named before
	New        string   `json:"new,omitempty"`
	Failed     []string `json:"failed,omitempty"`   // units that had failed before
	BootID     string   `json:"boot_id,omitempty"`  // of the boot in which it was activated, or is checked
	Deadline   int64    `json:"deadline,omitempty"` // milliseconds of that boot's monotonic clock
	DeadlineAt string   `json:"deadline_at,omitempty"`

	// Sets of secrets, see package credential; 0 where an agent began the attempt that knew of none.
	Secrets     int      `json:"secrets,omitempty"`      // of the new system
	OldSecrets  int      `json:"old_secrets,omitempty"`  // that was seen before
	BootSecrets int      `json:"boot_secrets,omitempty"` // that a boot would have found before
	Shown       int64    `json:"shown,omitempty"`        // when the new set was put in place, in milliseconds of the boot's monotonic clock
	Changed     []string `json:"changed,omitempty"`      // names of the secrets that are different
	Loaders     []string `json:"loaders,omitempty"`      // units that load one of those, from before the activation

	Armed    bool   `json:"armed,omitempty"`    // a revert timer may exist
	Default  bool   `json:"default,omitempty"`  // profile or boot default may name the new closure
	BootSet  bool   `json:"boot_set,omitempty"` // the boot default names it
	Disarmed bool   `json:"disarmed,omitempty"` // proven; there is no way back
	Rebooted string `json:"rebooted,omitempty"` // boot id in which the reboot back was ordered
	Reverted bool   `json:"reverted,omitempty"` // the old closure runs again

	Reason   string   `json:"reason,omitempty"` // why it goes back
	Spare    bool     `json:"spare,omitempty"`  // the closure is not to blame: no quarantine
	NewUnits []string `json:"new_units,omitempty"`
	Log      string   `json:"log,omitempty"`

	Checks []protocol.CheckResult `json:"checks,omitempty"`
}

// by is who signed the manifest.
func (a *attempt) by() protocol.Identity { return protocol.Identity{Name: a.User, Role: a.Role} }

// save writes the journal, bounded.
func (j *journal) save(dir string, write writer) error {
	if n := len(j.Reports) - maxReports; n > 0 {
		j.Reports = slices.Delete(j.Reports, 0, n)
	}
	for len(j.Quarantine) > maxQuarantine {
		oldest := slices.MinFunc(slices.Collect(maps.Keys(j.Quarantine)), func(a, b string) int {
			return j.Quarantine[a].Time.Compare(j.Quarantine[b].Time)
		})
		delete(j.Quarantine, oldest)
	}
	data, err := json.Marshal(j)
	if err != nil {
		return err
	}
	return write(filepath.Join(dir, journalFile), append(data, '\n'), 0o600)
}

// readJournal reads the journal as it is; one that isn't there is the zero one.
func readJournal(dir string) (journal, error) {
	file := filepath.Join(dir, journalFile)
	data, err := atomicfile.Read(file, maxJournal)
	if errors.Is(err, fs.ErrNotExist) {
		return journal{}, nil
	}
	if err != nil {
		return journal{}, fmt.Errorf("can't read where the node stands: %w", err)
	}
	j, err := parseJournal(data)
	if err != nil {
		return journal{}, fmt.Errorf("%s is damaged (%v); the agent sets it aside when it starts", file, err)
	}
	return j, nil
}

// openJournal reads the journal. A damaged one is moved aside, notice says so, and what must not be
// forgotten, the highest serial, is read from the stored manifests.
func openJournal(dir, node string) (j journal, notice string, err error) {
	file := filepath.Join(dir, journalFile)
	fresh := journal{Version: journalVersion, Quarantine: map[string]Quarantine{}}
	data, err := atomicfile.Read(file, maxJournal)
	if errors.Is(err, fs.ErrNotExist) {
		fresh.Seen = highestStored(dir, node)
		return fresh, "", nil
	}
	if err == nil {
		j, err = parseJournal(data)
	}
	if err == nil {
		return j, "", nil
	}
	aside := fmt.Sprintf("%s.damaged-%d", file, time.Now().Unix())
	notice = fmt.Sprintf("the journal was damaged (%v) and is now %s; deploy again", err, aside)
	if err := os.Rename(file, aside); err != nil {
		return journal{}, "", fmt.Errorf("the journal %s is damaged and can't be set aside: %w", file, err)
	}
	fresh.Seen = highestStored(dir, node)
	return fresh, notice, nil
}

func parseJournal(data []byte) (journal, error) {
	var j journal
	// Fields that are not known are a newer agent's, which was rolled back while its attempt was under way.
	d := json.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(&j); err != nil {
		return j, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return j, errors.New("something follows the document")
	}
	if j.Version != journalVersion {
		return j, fmt.Errorf("it is of version %d, this agent writes version %d", j.Version, journalVersion)
	}
	if j.Quarantine == nil {
		j.Quarantine = map[string]Quarantine{}
	}
	if a := j.Attempt; a != nil {
		if _, ok := legal[a.Phase]; !ok || a.Phase == "" || !protocol.IsDigest(a.Digest) {
			return j, fmt.Errorf("its attempt is in phase %q with manifest %q", a.Phase, a.Digest)
		}
	}
	return j, nil
}

// stored reads a manifest that was verified when it was stored. It is not verified again: a node has to
// be able to finish or to go back even where the deployer was revoked meanwhile.
func stored(dir, digest string) (*protocol.Manifest, error) {
	data, err := atomicfile.Read(filepath.Join(dir, manifestsDir, digest), protocol.MaxMessage)
	if err != nil {
		return nil, err
	}
	if protocol.Digest(data) != digest {
		return nil, fmt.Errorf("the stored manifest %s is damaged", digest)
	}
	return unverified(data)
}

func unverified(doc []byte) (*protocol.Manifest, error) {
	signed, err := protocol.Decode[protocol.Signed](doc)
	if err != nil {
		return nil, err
	}
	m, err := protocol.Decode[protocol.Manifest](signed.Payload)
	return &m, err
}

// highestStored is the highest serial among the stored manifests of a node.
func highestStored(dir, node string) uint64 {
	entries, err := os.ReadDir(filepath.Join(dir, manifestsDir))
	if err != nil {
		return 0
	}
	var highest uint64
	for _, entry := range entries {
		if !protocol.IsDigest(entry.Name()) {
			continue
		}
		if m, err := stored(dir, entry.Name()); err == nil && m.Node == node && !isLocal(m.Deployment) {
			highest = max(highest, m.Serial)
		}
	}
	return highest
}

// prune removes stored manifests and staged trees that nothing refers to.
func (e *Engine) prune() {
	e.mu.Lock()
	keep := map[string]bool{e.j.Installed: true}
	trees := map[string]bool{}
	for _, c := range e.j.History {
		keep[c.Digest] = true
	}
	for a := e.j.Attempt; a != nil; a = a.Staged {
		keep[a.Digest], keep[a.Source], trees[a.Deployment] = true, true, true
	}
	seen := e.j.Seen
	e.mu.Unlock()
	e.pruneSecrets()
	for _, entry := range names(filepath.Join(e.o.Dir, manifestsDir)) {
		if keep[entry] {
			continue
		}
		// The newest one stays, whatever became of it: it is the memory of the highest serial.
		if m, err := stored(e.o.Dir, entry); err == nil && m.Serial >= seen && !isLocal(m.Deployment) && !strings.HasPrefix(entry, ".") {
			continue
		}
		e.remove(filepath.Join(e.o.Dir, manifestsDir, entry))
	}
	for _, entry := range names(filepath.Join(e.o.Dir, treesDir)) {
		if !trees[entry] {
			e.remove(filepath.Join(e.o.Dir, treesDir, entry))
		}
	}
}

func (e *Engine) remove(path string) {
	if err := os.RemoveAll(path); err != nil {
		e.o.Log.Warn("can't remove what is not needed any more", "path", path, "error", err)
	}
}

func names(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var all []string
	for _, entry := range entries {
		all = append(all, entry.Name())
	}
	return all
}
