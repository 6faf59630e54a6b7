package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/nix-infra/nix-infra/agent/policy"
	"github.com/nix-infra/nix-infra/agent/query"
	"github.com/nix-infra/nix-infra/agent/run"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/rule"
)

// What a command may take. Those of the rules look at things, or have systemd do them.
const (
	commandMemory = 512 << 20 // bytes
	commandTasks  = 128
	outputLimit   = 64 << 20 // bytes, of a shell's or an action's output
)

// runs are what can be run here. Who may is protocol's table of roles, and then the node's policy.
func (a *agent) runs() map[protocol.Action]query.Streamer {
	return map[protocol.Action]query.Streamer{
		protocol.RunCommand: running(a, a.command),
		protocol.RunShell:   running(a, a.shell),
		protocol.RunScript:  running(a, a.script),
	}
}

// running makes a streamer of a function that says what an order has run, and which rule of the policy allows it.
func running[O any](a *agent, specify func(o O, who protocol.Identity) (spec run.Spec, by string, err error)) query.Streamer {
	return func(ctx context.Context, r *protocol.Verified, send func(any) error) error {
		o, err := protocol.Decode[O](r.Payload)
		if err != nil {
			return protocol.Refuse(protocol.Malformed, "%v", err)
		}
		spec, by, err := specify(o, r.Sender)
		if err != nil {
			return err
		}
		spec.ID = r.ID
		spec.What = fmt.Sprintf("%s of %s (%s)", r.Action, r.Sender.Name, r.Sender.Role)
		return run.Run(ctx, a.runner, spec, func(part protocol.Output) error {
			if part.Ended != nil {
				part.Ended.Rule = by
			}
			return send(part)
		})
	}
}

func (a *agent) command(o protocol.CommandOrder, who protocol.Identity) (run.Spec, string, error) {
	p, err := policy.Load(a.system)
	if err != nil {
		return run.Spec{}, "", err
	}
	allowed, err := rule.Match(p.Rules(), o.Argv, o.As(who.Role))
	if err != nil {
		return run.Spec{}, "", err
	}
	argv := slices.Clone(allowed.Argv)
	if argv[0], err = run.Program(argv[0]); err != nil {
		return run.Spec{}, "", err
	}
	r := &allowed.Rule
	timeout, output := r.Limits()
	return run.Spec{Argv: argv, Env: r.Environ(a.machine.Name), User: r.User, Groups: r.Groups,
		Timeout: timeLimit(o.Timeout, timeout), Memory: commandMemory, Tasks: commandTasks, Output: output, Seal: a.sealing(o.SealTo)}, r.Name, nil
}

func (a *agent) shell(o protocol.ShellOrder, _ protocol.Identity) (run.Spec, string, error) {
	p, err := policy.Load(a.system)
	if err != nil {
		return run.Spec{}, "", err
	}
	if p.Shell == nil {
		return run.Spec{}, "", protocol.Refuse(protocol.Denied, "the policy of %s allows no shell (allowShell): give a command that it allows, or use --via=ssh", a.machine.Name)
	}
	spec, err := a.asRoot("sh", []string{"-c", o.Text}, p, timeLimit(o.Timeout, p.Shell.Timeout))
	return spec, "allowShell", err
}

func (a *agent) script(o protocol.ScriptOrder, _ protocol.Identity) (run.Spec, string, error) {
	p, err := policy.Load(a.system)
	if err != nil {
		return run.Spec{}, "", err
	}
	deployment, content, err := a.engine.Deployed(protocol.ModuleAction(o.Module))
	if err != nil {
		return run.Spec{}, "", err
	}
	if have := protocol.Digest(content); have != o.SHA256 {
		return run.Spec{}, "", protocol.Refuse(protocol.Conflict, "the action of %s that is meant (%.12s) is not the one that deployment %s brought to %s (%.12s): deploy first",
			o.Module, o.SHA256, deployment, a.machine.Name, have)
	}
	env, err := a.unsealEnv(o.Env)
	if err != nil {
		return run.Spec{}, "", err
	}
	spec, err := a.asRoot("bash", o.Words, p, timeLimit(o.Timeout, p.ActionLimits().Timeout))
	spec.Script, spec.Private, spec.Seal = content, env, a.sealing(o.SealTo)
	return spec, "", err
}

// asRoot has root run a program from its home, with what an action may take.
func (a *agent) asRoot(program string, args []string, p policy.Policy, timeout time.Duration) (run.Spec, error) {
	file, err := run.Program(program)
	limits := p.ActionLimits()
	return run.Spec{Argv: append([]string{file}, args...), Dir: "/root", User: "root",
		Timeout: timeout, Memory: limits.Memory, Tasks: limits.Tasks, Output: outputLimit}, err
}

// unsealEnv opens an action's environment. No error has a value in it.
func (a *agent) unsealEnv(sealed []byte) (env map[string]string, err error) {
	if len(sealed) == 0 {
		return nil, nil
	}
	data, err := protocol.Unseal(sealed, a.machine.XKey)
	if err != nil {
		return nil, protocol.Refuse(protocol.Invalid, "the environment: %v; nix-infra nodes shows the key of %s", err, a.machine.Name)
	}
	defer clear(data)
	if json.Unmarshal(data, &env) != nil {
		return nil, protocol.Refuse(protocol.Malformed, "the environment is no JSON object of strings")
	}
	if err := run.CheckPrivate(env); err != nil {
		return nil, protocol.Refuse(protocol.Invalid, "%v", err)
	}
	return env, nil
}

// sealing encrypts an output to a curve key, by the node's own: whoever opens it sees that it is this node's. nil: it is
// not to be sealed.
func (a *agent) sealing(to string) func([]byte) ([]byte, error) {
	if to == "" {
		return nil
	}
	return func(output []byte) ([]byte, error) { return a.machine.XKey.Seal(output, to) }
}

// timeLimit is what an order asks for, within what is allowed; both in seconds.
func timeLimit(asked, allowed int) time.Duration {
	if asked == 0 || asked > allowed {
		asked = allowed
	}
	return time.Duration(asked) * time.Second
}

// RunDir is where the agent of a folder keeps what is private of what it runs: on a tmpfs.
func RunDir(dir string) string {
	if dir == DefaultDir {
		return "/run/nix-infra-agent"
	}
	return filepath.Join(dir, "run")
}
