package protocol

import (
	"fmt"
	"slices"
	"strings"

	"github.com/nats-io/nkeys"
)

// What a node runs for somebody: a command that its policy allows, a shell text where it allows that, or an app module's
// action. The answer comes in parts, like a stream's: it has to be renewed, and whoever asked can end it, which ends
// what runs, with all its children.

// Limits of what is run.
const (
	MaxArgs     = 256       // of one command
	MaxArgSize  = 16 << 10  // bytes, of all its arguments together
	MaxEnvSize  = 64 << 10  // bytes, of an action's environment
	MaxRunTime  = 24 * 3600 // seconds
	MaxSealed   = 256 << 10 // bytes, of an output that is sealed
	OutputChunk = 256 << 10 // bytes, about, of one Output
)

// CommandOrder is RunCommand's.
type CommandOrder struct {
	Argv    []string `json:"argv"`              // the program and its arguments, each as the program gets it
	Timeout int      `json:"timeout,omitempty"` // seconds, at most what the rule has; 0: what the rule has
	SealTo  string   `json:"seal_to,omitempty"` // public curve key: what is written to stdout is sealed to it
	Role    Role     `json:"role,omitempty"`    // only by rules that need no more than this, whoever sends it; "": than the sender's
}

// As is the role by which the rules are gone through that somebody of a role has at hand: theirs, or the lower one that the
// order asks for.
func (o *CommandOrder) As(sender Role) Role {
	if o.Role != "" && sender.AtLeast(o.Role) {
		return o.Role
	}
	return sender
}

// ShellOrder is RunShell's.
type ShellOrder struct {
	Text    string `json:"text"`
	Timeout int    `json:"timeout,omitempty"` // seconds; 0: the policy's
}

// ScriptOrder is RunScript's: the action.sh of an app module in the node's source tree, as it was deployed.
type ScriptOrder struct {
	Module  string   `json:"module"`
	SHA256  string   `json:"sha256"` // of the action.sh that is meant
	Words   []string `json:"words,omitempty"`
	Env     []byte   `json:"env,omitempty"`     // a JSON object of strings, sealed to the node
	Timeout int      `json:"timeout,omitempty"` // seconds; 0: the policy's
	SealTo  string   `json:"seal_to,omitempty"` // as in CommandOrder
}

// Output is a part of the answer. The last one has Ended.
type Output struct {
	Stdout  []byte  `json:"stdout,omitempty"`
	Stderr  []byte  `json:"stderr,omitempty"`
	Dropped int64   `json:"dropped,omitempty"` // bytes that were left out, because there was more than the rule lets through
	Sealed  []byte  `json:"sealed,omitempty"`  // all of stdout, by the node's curve key to SealTo; only where it exited with 0
	Ended   *Ending `json:"ended,omitempty"`
}

// Ending is how what was run ended.
type Ending struct {
	Exit   int    `json:"exit"`             // exit status; -1: it was ended
	Result string `json:"result"`           // one of these constants, or another word of systemd's
	Reason string `json:"reason,omitempty"` // for people, where it did not succeed
	Rule   string `json:"rule,omitempty"`   // of the policy, that allowed it
	Millis int64  `json:"ms"`
	CPU    int64  `json:"cpu,omitempty"`    // nanoseconds
	Memory int64  `json:"memory,omitempty"` // bytes, at most; 0: not known
}

// Results: systemd's words, but for the last two.
const (
	ResultSuccess = "success"
	ResultExit    = "exit-code" // it exited with another status than 0
	ResultSignal  = "signal"
	ResultTimeout = "timeout"
	ResultMemory  = "oom-kill"
	ResultEnded   = "ended"   // by who asked for it, or because nobody renewed it, or with the agent
	ResultStopped = "stopped" // somebody on the node stopped its unit
)

// Over tells whether what was run came to its own end, whatever its exit status, or was ended by who asked for it.
func (e *Ending) Over() bool {
	return e.Result == ResultSuccess || e.Result == ResultExit || e.Result == ResultEnded
}

// Validate checks the order's form. Whether it may be run is the policy's to say.
func (o *CommandOrder) Validate() error {
	if len(o.Argv) == 0 || o.Argv[0] == "" {
		return fmt.Errorf("no program is named")
	}
	if err := checkArgs(o.Argv); err != nil {
		return err
	}
	if o.Role != "" && !slices.Contains(people, o.Role) {
		return fmt.Errorf("%.80q is no role of people", o.Role)
	}
	return checkRun(o.Timeout, o.SealTo)
}

// Validate checks the order's form.
func (o *ShellOrder) Validate() error {
	if strings.TrimSpace(o.Text) == "" || len(o.Text) > MaxArgSize || strings.ContainsRune(o.Text, 0) {
		return fmt.Errorf("the text is empty, has a NUL in it, or more than %d bytes", MaxArgSize)
	}
	return checkRun(o.Timeout, "")
}

// Validate checks the order's form.
func (o *ScriptOrder) Validate() error {
	if !isModule(o.Module) {
		return fmt.Errorf("%.80q is no app module's name", o.Module)
	}
	if !IsDigest(o.SHA256) {
		return fmt.Errorf("the digest of the action is not valid")
	}
	if len(o.Env) > MaxEnvSize+1024 {
		return fmt.Errorf("the environment has %d bytes, the limit is %d", len(o.Env), MaxEnvSize)
	}
	if err := checkArgs(o.Words); err != nil {
		return err
	}
	return checkRun(o.Timeout, o.SealTo)
}

// isModule tells whether s can be a folder's name in app_modules.
func isModule(s string) bool {
	return s != "" && len(s) <= 128 && s[0] != '.' && s[0] != '-' &&
		strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == ""
}

func checkArgs(args []string) error {
	size := 0
	for _, a := range args {
		if strings.ContainsRune(a, 0) {
			return fmt.Errorf("argument %.80q has a NUL in it", a)
		}
		size += len(a) + 1
	}
	if len(args) > MaxArgs || size > MaxArgSize {
		return fmt.Errorf("%d arguments of %d bytes together; %d of %d bytes are possible", len(args), size, MaxArgs, MaxArgSize)
	}
	return nil
}

func checkRun(timeout int, sealTo string) error {
	if timeout < 0 || timeout > MaxRunTime {
		return fmt.Errorf("timeout %d s; up to %d are possible", timeout, MaxRunTime)
	}
	if sealTo != "" && !nkeys.IsValidPublicCurveKey(sealTo) {
		return fmt.Errorf("%.80q is not a public curve key", sealTo)
	}
	return nil
}

// TunnelOrder is OpenTunnel's: a stream of bytes between the user and something on, or near, the node. Its frames are
// in package tunnel; the keys of both sides are for this tunnel alone.
type TunnelOrder struct {
	To     string `json:"to"`               // host:port, of TCP; or TunnelUpload
	Public []byte `json:"public"`           // X25519, 32 bytes
	Window int64  `json:"window,omitempty"` // bytes that the user's side takes before it says that it took them
}

// TunnelUpload is a tunnel's end at the agent itself, which takes files in.
const TunnelUpload = "upload"

// OverlayHost stands in TunnelOrder.To for the node's own address in the overlay network of its cluster, which only the
// node knows.
const OverlayHost = "overlay"

// TunnelReply answers OpenTunnel: the other end is there.
type TunnelReply struct {
	Public []byte `json:"public"` // X25519, 32 bytes
	Window int64  `json:"window"`
	Rule   string `json:"rule,omitempty"` // of the policy, that allowed it
}

// Validate checks the order's form.
func (o *TunnelOrder) Validate() error {
	if len(o.Public) != 32 {
		return fmt.Errorf("the public key has %d bytes, not 32", len(o.Public))
	}
	if o.Window < 0 {
		return fmt.Errorf("a window of %d bytes", o.Window)
	}
	if o.To == TunnelUpload {
		return nil
	}
	return CheckAddress(o.To)
}

// ModuleAction is where a module's action is in a node's source tree.
func ModuleAction(module string) string { return "app_modules/" + module + "/action.sh" }
