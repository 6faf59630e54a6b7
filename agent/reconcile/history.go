package reconcile

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

const maxHistory = 20

// Confirmation is a manifest that was proven here.
type Confirmation struct {
	Serial     uint64        `json:"serial"`
	Deployment string        `json:"deployment"`
	Digest     string        `json:"digest,omitempty"` // of the signed manifest whose files the closure is made of, "" where none is known
	Mode       protocol.Mode `json:"mode"`
	Tree       string        `json:"tree,omitempty"` // see Engine.treeKey; "" where the node's source tree shows something else
	Closure    string        `json:"closure"`
	Before     string        `json:"before"` // closure that ran before
	// The sets of secrets with Closure and with Before; 0 where an agent confirmed it that knew of none.
	Secrets       int       `json:"secrets,omitempty"`
	BeforeSecrets int       `json:"before_secrets,omitempty"`
	Back          bool      `json:"back,omitempty"` // it was a rollback
	Time          time.Time `json:"time"`
}

// system is a closure with its secrets.
type system struct {
	closure string
	secrets int // 0: not known
}

// is tells whether two are the same, as far as it is known.
func (s system) is(other system) bool {
	return s.closure == other.closure && (s.secrets == other.secrets || s.secrets == 0 || other.secrets == 0)
}

func (c *Confirmation) system() system { return system{c.Closure, c.Secrets} }
func (c *Confirmation) before() system { return system{c.Before, c.BeforeSecrets} }

// idle tells whether it switched nothing.
func (c *Confirmation) idle() bool { return c.system().is(c.before()) }

// remember adds to the history. What switched nothing is forgotten first.
func (j *journal) remember(c Confirmation) {
	j.History = append(j.History, c)
	if len(j.History) > maxHistory {
		idle := slices.IndexFunc(j.History[:maxHistory], func(c Confirmation) bool { return c.idle() })
		oldest := max(0, idle)
		j.History = slices.Delete(j.History, oldest, oldest+1)
	}
}

// last is what was confirmed last.
func (j *journal) last() (Confirmation, bool) {
	if len(j.History) == 0 {
		return Confirmation{}, false
	}
	return j.History[len(j.History)-1], true
}

// newest is the newest confirmation with a property.
func (j *journal) newest(has func(Confirmation) bool) (Confirmation, bool) {
	for _, c := range slices.Backward(j.History) {
		if has(c) {
			return c, true
		}
	}
	return Confirmation{}, false
}

// previous is where a rollback from a system goes to that names nothing: what was proven before that system was
// deployed here, or else what ran then. Two rollbacks in a row so go back twice, and not forth again.
func (j *journal) previous(running system) system {
	deployed := len(j.History)
	for i, c := range slices.Backward(j.History) {
		if c.system().is(running) && !c.before().is(running) && !c.Back {
			deployed = i
			break
		}
	}
	for _, c := range slices.Backward(j.History[:deployed]) {
		if !c.system().is(running) {
			return c.system()
		}
	}
	if deployed < len(j.History) {
		return j.History[deployed].before()
	}
	return system{}
}

// inQuarantine are the closures in quarantine, the newest first, as many as a beat names.
func (j *journal) inQuarantine() []string {
	all := slices.SortedFunc(maps.Keys(j.Quarantine), func(a, b string) int {
		if byTime := j.Quarantine[b].Time.Compare(j.Quarantine[a].Time); byTime != 0 {
			return byTime
		}
		return strings.Compare(a, b)
	})
	return all[:min(len(all), protocol.MaxQuarantine)]
}

// History is what was confirmed here, the newest first.
func (e *Engine) History() []Confirmation {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := slices.Clone(e.j.History)
	slices.Reverse(all)
	return all
}

// Confirmed is the closure that the last confirmed manifest left, "" where none was confirmed yet.
func (e *Engine) Confirmed() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, _ := e.j.last()
	return c.Closure
}

// InQuarantine are the newest closures that were rolled back from, at most protocol.MaxQuarantine.
func (e *Engine) InQuarantine() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.j.inQuarantine()
}

// Baseline are the units that had failed before the last confirmed manifest, sorted. known is false where
// nothing was confirmed yet.
func (e *Engine) Baseline() (units []string, known bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.j.Baseline), e.j.Baseline != nil
}

// Keep are the store paths that the garbage collector must not take, each with the reason.
func (e *Engine) Keep(ctx context.Context) (map[string]string, error) {
	obs, err := e.observe(ctx)
	if err != nil {
		return nil, err
	}
	back, err := e.previous(ctx, obs)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	keep := map[string]string{}
	add := func(closure, why string) {
		if keep[closure] == "" && closure != "" {
			keep[closure] = why
		}
	}
	add(obs.Running, "runs")
	add(obs.Profile, "boots")
	add(obs.Booted, "was booted")
	if a := e.j.Attempt; a != nil {
		for _, closure := range []string{a.New, a.Old, a.OldProfile} {
			add(closure, "belongs to deployment "+a.Deployment)
		}
	}
	last, _ := e.j.last()
	add(last.Closure, "was confirmed last")
	add(back.closure, "is where a rollback goes to")
	for _, closure := range e.j.inQuarantine() {
		add(closure, "in quarantine")
	}
	return keep, nil
}

// Names of our gc roots. Quarantined closures have theirs by their hash.
const (
	rootBuilt      = "built"
	rootNew        = "new"
	rootOld        = "old"
	rootCurrent    = "current"
	rootPrevious   = "previous"
	rootQuarantine = "quarantine-"
)

// keepRoots keeps from the garbage collector what runs and what the journal has a use for, and lets go of
// what an attempt that is over had kept.
func (e *Engine) keepRoots(running string) {
	live, _ := e.secrets.Standing()
	e.mu.Lock()
	roots := map[string]string{rootCurrent: running, rootPrevious: e.j.previous(system{running, live.Number}).closure}
	if e.j.Attempt == nil {
		roots[rootNew], roots[rootOld], roots[rootBuilt] = "", "", ""
	}
	e.mu.Unlock()
	e.keepQuarantined() // first: an attempt that was rolled back lets go of one
	for name, closure := range roots {
		e.setRoot(name, closure)
	}
}

// keepQuarantined keeps the evidence.
func (e *Engine) keepQuarantined() {
	e.roots.Lock()
	defer e.roots.Unlock()
	wanted := map[string]string{}
	for _, closure := range e.InQuarantine() {
		hash, _, _ := strings.Cut(strings.TrimPrefix(closure, nix.StoreDir+"/"), "-")
		wanted[rootQuarantine+hash] = closure
	}
	for _, name := range names(e.o.Roots) {
		if strings.HasPrefix(name, rootQuarantine) && wanted[name] == "" {
			wanted[name] = ""
		}
	}
	for name, closure := range wanted {
		e.setRoot(name, closure)
	}
}

func (e *Engine) setRoot(name, closure string) {
	if have, err := os.Readlink(filepath.Join(e.o.Roots, name)); err == nil && have == closure {
		return // as most often; each change waits for the disk
	}
	if err := nix.SetRoot(e.o.Roots, name, closure); err != nil {
		e.o.Log.Warn("a gc root can't be set", "root", name, "error", err)
	}
}

// Record is what an engine's folder tells of a node.
type Record struct {
	State      State
	History    []Confirmation        // the newest first
	Quarantine map[string]Quarantine // by closure
}

// ReadRecord reads an engine's folder, without an engine. A node to which nothing was deployed yet has the
// zero Record.
func ReadRecord(dir string) (Record, error) {
	j, err := readJournal(dir)
	if err != nil {
		return Record{}, err
	}
	slices.Reverse(j.History)
	return Record{State: j.State, History: j.History, Quarantine: j.Quarantine}, nil
}
