package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// variable is one of an action's, before its placeholders are filled in.
type variable struct{ name, value string }

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// readVariables reads those that are separated by commas, and those that stand alone.
func readVariables(lists, single []string, getenv func(string) string) ([]variable, error) {
	var all []variable
	add := func(flag, item string) error {
		name, value, ok := strings.Cut(item, "=")
		if !variableName.MatchString(name) || !ok && flag == "--env-vars" {
			// The text itself may be the rest of a value that has a comma, and so of a secret.
			return fmt.Errorf("%s: expected K=value; a value with a comma in it needs --env-var for itself", flag)
		}
		if !ok {
			if value = getenv(name); value == "" {
				return fmt.Errorf("--env-var %s: it is not set in the environment here, or empty; give --env-var %s=value", name, name)
			}
		}
		if slices.ContainsFunc(all, func(v variable) bool { return v.name == name }) {
			return fmt.Errorf("%s: %s is given twice", flag, name)
		}
		all = append(all, variable{name, value})
		return nil
	}
	for _, list := range lists {
		for item := range strings.SplitSeq(list, ",") {
			if strings.TrimSpace(item) == "" {
				continue
			}
			if err := add("--env-vars", strings.TrimLeft(item, " ")); err != nil {
				return nil, err
			}
		}
	}
	for _, item := range single {
		if err := add("--env-var", item); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// orders are the orders of the nodes: their environments differ, as each is sealed to one of them.
func (q *question) orders(ctx context.Context, order protocol.ScriptOrder, variables []variable) (func(node string) any, error) {
	if len(variables) == 0 {
		return func(string) any { return order }, nil
	}
	all, err := q.session.ListNodes(ctx)
	if err != nil {
		return nil, err
	}
	known, of := nodeFacts(all), map[string]protocol.ScriptOrder{}
	var wrong []error
	for i := range q.nodes {
		n := &q.nodes[i]
		own := order
		if own.Env, err = q.sealedEnv(n, known, variables); err != nil {
			wrong = append(wrong, fmt.Errorf("%s: %w", n.Name, err))
			continue
		}
		of[n.Name] = own
	}
	if len(wrong) > 0 {
		return nil, several("can't get their variables; nothing was run", wrong)
	}
	return func(node string) any { return of[node] }, nil
}

// sealedEnv fills in the variables for a node and seals them to it.
func (q *question) sealedEnv(n *protocol.NodeState, known []project.NodeFacts, variables []variable) ([]byte, error) {
	id, err := q.session.me.verifier.ProveNode(&n.NodeRecord, time.Now())
	if err != nil {
		return nil, err
	}
	p, values := q.session.me.project, map[string]string{}
	for _, variable := range variables {
		value, err := p.Fill(project.TreeRequest{Node: n.Name, Nodes: known}, variable.value, func(name string) (string, error) {
			secret, err := q.secretStore(p).Get(name)
			if errors.Is(err, fs.ErrNotExist) {
				err = fmt.Errorf("there is no secret %s; nix-infra secrets store %s makes it", name, name)
			}
			return string(secret), err
		})
		if err != nil {
			return nil, fmt.Errorf("variable %s: %w", variable.name, err)
		}
		values[variable.name] = value
	}
	env, err := json.Marshal(values)
	if err != nil {
		return nil, err
	}
	if len(env) > protocol.MaxEnvSize {
		return nil, fmt.Errorf("the variables have %d bytes together, the limit is %d", len(env), protocol.MaxEnvSize)
	}
	return protocol.Seal(env, id.XKey)
}
