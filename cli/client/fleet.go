package client

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// Each is called with every answer, once per node or, where it comes in parts, once per part, from one goroutine. A
// refusal comes as err, and so does an answer that can't be read.
type Each func(node string, r *protocol.Reply, err error)

// Broadcast signs one request to every node and hands the answers of the expected ones to each, as
// they come, until all are there or ctx ends. It returns who did not answer.
func (c *Client) Broadcast(ctx context.Context, action protocol.Action, payload any, expect []string, each Each) (silent []string, err error) {
	signed, id, err := c.config.Signer.Request(action, protocol.Everyone, payload, time.Now())
	if err != nil {
		return nil, err
	}
	subject := protocol.RequestSubject(protocol.Everyone, action)
	said := false
	collecting := &collection{
		client: c, each: each, replies: protocol.ReplySubject(c.config.Name, id, "*"), denied: subject, order: expect,
		ask: func(string) (string, error) {
			if said {
				return id, nil
			}
			said = true
			return id, c.nc.Publish(subject, protocol.Encode(signed))
		},
	}
	return collecting.run(ctx)
}

// ListNodes lists all nodes, or only the named ones that exist, by name.
func (c *Client) ListNodes(ctx context.Context, names ...string) ([]protocol.NodeState, error) {
	var nodes []protocol.NodeState
	page := protocol.Page{Names: names}
	for {
		var list protocol.NodeList
		if err := c.Controller(ctx, protocol.ListNodes, page, &list); err != nil {
			return nil, err
		}
		nodes = append(nodes, list.Nodes...)
		if list.Next == "" {
			return nodes, nil
		}
		if list.Next <= page.After {
			return nil, fmt.Errorf("the controller's list of nodes does not advance past %q", page.After)
		}
		page.After = list.Next
	}
}

// Node is the state of one node, or an Unknown refusal.
func (c *Client) Node(ctx context.Context, name string) (*protocol.NodeState, error) {
	nodes, err := c.ListNodes(ctx, name)
	if err != nil {
		return nil, err
	}
	for _, n := range nodes {
		if n.Name == name {
			return &n, nil
		}
	}
	return nil, protocol.Refuse(protocol.Unknown, "there is no node %q; nix-infra nodes lists them", name)
}

// drainTime bounds how long the end of Watch waits for events that are under way.
const drainTime = 2 * time.Second

// Watch hands the events of a deployment to each, from one goroutine, until stop was called, which hands over what the
// broker has by then. Events are for show: some may get lost, and Deployment tells how things really are.
func (c *Client) Watch(deployment string, each func(node string, e protocol.Event)) (stop func(), err error) {
	sub, err := c.nc.Subscribe(protocol.EventSubject("*", deployment), func(m *nats.Msg) {
		node, of, ok := protocol.EventSender(m.Subject)
		if !ok || of != deployment {
			return
		}
		if e, err := protocol.Decode[protocol.Event](m.Data); err == nil {
			each(node, e)
		}
	})
	if err != nil {
		return nil, err
	}
	if err := c.nc.FlushTimeout(controllerTimeout); err != nil { // so that nothing is published before we listen
		sub.Unsubscribe()
		return nil, fmt.Errorf("can't watch deployment %s: %w", deployment, err)
	}
	return sync.OnceFunc(func() {
		drained := make(chan struct{})
		sub.SetClosedHandler(func(string) { close(drained) })
		if sub.Drain() != nil {
			return // the connection is gone, and the subscription with it
		}
		select {
		case <-drained:
		case <-time.After(drainTime):
			sub.Unsubscribe()
		}
	}), nil
}

// Deployment is how far a deployment is, on all of the nodes that q asks for. It comes in parts, each
// of which is as of its own moment.
func (c *Client) Deployment(ctx context.Context, q protocol.DeploymentQuery) (*protocol.Deployment, error) {
	nodes := map[string]protocol.NodeResult{}
	for {
		var d protocol.Deployment
		if err := c.Controller(ctx, protocol.ShowDeployment, q, &d); err != nil {
			return nil, err
		}
		maps.Copy(nodes, d.Nodes)
		if d.Next == "" {
			d.Nodes = nodes
			return &d, nil
		}
		if d.Next <= q.After {
			return nil, fmt.Errorf("the controller's answer about deployment %s does not advance past %q", q.ID, q.After)
		}
		q.After = d.Next
	}
}

// Summary is how far a deployment is in numbers, or an Unknown refusal.
func (c *Client) Summary(ctx context.Context, id string) (*protocol.Deployment, error) {
	var list protocol.DeploymentList
	if err := c.Controller(ctx, protocol.ListDeployments, protocol.Page{Names: []string{id}}, &list); err != nil {
		return nil, err
	}
	for i := range list.Deployments {
		if list.Deployments[i].ID == id {
			return &list.Deployments[i], nil
		}
	}
	return nil, unknownDeployment(id)
}

// Newest is what FindDeployment knows the newest deployment as.
const Newest = "last"

// Steer has a rollout paused, resumed or aborted, and tells where it stands then.
func (c *Client) Steer(ctx context.Context, o protocol.RolloutOrder) (*protocol.Deployment, error) {
	var d protocol.Deployment
	if err := c.Controller(ctx, protocol.SteerRollout, o, &d); err != nil {
		return nil, err
	}
	return &d, nil
}

// FindDeployment is the summary of the deployment that is called id, or whose id alone begins with it, or of the
// newest one of those that count.
func (c *Client) FindDeployment(ctx context.Context, id string, counts func(*protocol.Deployment) bool) (*protocol.Deployment, error) {
	all, err := c.Deployments(ctx, 0)
	if err != nil {
		return nil, err
	}
	var found *protocol.Deployment
	for i := range all {
		switch d := &all[i]; {
		case d.ID == id, id == Newest && counts(d):
			return d, nil
		case id == "" || !strings.HasPrefix(d.ID, id):
		case found != nil && found.ID == protocol.BackID(d.ID):
			found = d // the other is its way back
		case found != nil:
			return nil, fmt.Errorf("%q is the beginning of more than one deployment's id, %s and %s; say more of it", id, d.ID, found.ID)
		default:
			found = d
		}
	}
	if found == nil {
		return nil, unknownDeployment(id)
	}
	return found, nil
}

func unknownDeployment(id string) error {
	return protocol.Refuse(protocol.Unknown, "there is no deployment %q; nix-infra deployments lists them", id)
}

// Deployments lists the newest deployments, at most limit of them (0: all).
func (c *Client) Deployments(ctx context.Context, limit int) ([]protocol.Deployment, error) {
	var all []protocol.Deployment
	page := protocol.Page{Limit: limit}
	for {
		var list protocol.DeploymentList
		if err := c.Controller(ctx, protocol.ListDeployments, page, &list); err != nil {
			return nil, err
		}
		all = append(all, list.Deployments...)
		if limit > 0 && len(all) >= limit {
			return all[:limit], nil
		}
		if list.Next == "" || list.Next == page.After {
			return all, nil
		}
		page.After = list.Next
	}
}
