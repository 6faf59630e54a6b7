package command

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/protocol"
)

// newcomer is a machine that was reached by SSH, on its way to be a node or a controller.
type newcomer struct {
	name    string
	machine *provision.Machine
	host    string // by which it was reached
	binary  string // to upload; "": the one beside this program
	step    func(what string)
}

// becomeNode installs the agent on it. Lasting is as provision.Install has it; the next that the controller hears of it is
// its first beat.
func (n *newcomer) becomeNode(ctx context.Context, e *enrolment, fleet *session, before *protocol.NodeState, tags []string) (lasting bool, err error) {
	ipv4 := ""
	if ip := net.ParseIP(n.host); ip != nil && ip.To4() != nil && !ip.IsLoopback() { // at loopback is the end of a tunnel
		ipv4 = n.host
	}
	_, lasting, err = provision.Install(ctx, n.machine, provision.Installation{
		Program: provision.Agent, Name: n.name, Binary: n.binary, Step: n.step,
		Sign: func(r *protocol.EnrolRequest) (*protocol.EnrolAnswer, error) {
			answer, err := e.Sign(r, nil, time.Now())
			if err != nil {
				return nil, err
			}
			// Registered before it starts, so that its first beat is taken.
			return answer, register(ctx, fleet, before, r, answer.User, ipv4, tags)
		},
	})
	return lasting, err
}

// becomeController installs the controller on it, for people and nodes who come to the hosts of the project's URLs or to
// addresses. Where the project has no URLs yet, it gets those of this machine.
func (n *newcomer) becomeController(ctx context.Context, a *app, e *enrolment, addresses []string) (lasting bool, err error) {
	if len(e.Controllers) == 0 {
		host := n.host
		if len(addresses) > 0 {
			host = addresses[0]
		}
		e.Controllers = []string{"tls://" + net.JoinHostPort(host, "4222"), "wss://" + net.JoinHostPort(host, "443")}
		e.me.project.Settings.Controllers = e.Controllers
		if _, err := a.changeSettings(func(now *project.Project) (project.Settings, error) {
			after := now.Settings
			if len(after.Controllers) > 0 {
				return after, fmt.Errorf("another run made a controller meanwhile (%s in %s); run the same command again", strings.Join(after.Controllers, ", "), project.SettingsFile)
			}
			after.Controllers = e.Controllers
			return after, nil
		}); err != nil {
			return false, err
		}
		n.step("controllers in nix-infra.yaml: " + strings.Join(e.Controllers, ", "))
	}
	_, lasting, err = provision.Install(ctx, n.machine, provision.Installation{
		Program: provision.Controller, Name: n.name, Binary: n.binary, Step: n.step,
		Sign: func(r *protocol.EnrolRequest) (*protocol.EnrolAnswer, error) {
			return e.Sign(r, hosts(n.name, n.host, addresses, e.Controllers), time.Now())
		},
	})
	if err != nil {
		return false, err
	}
	return lasting, provision.OpenPorts(ctx, n.machine, portsOf(e.Controllers))
}

// portsOf are the ports of URLs that were checked.
func portsOf(urls []string) []int {
	var ports []int
	for _, s := range urls {
		if u, err := url.Parse(s); err == nil {
			if port, err := strconv.Atoi(u.Port()); err == nil {
				ports = append(ports, port)
			}
		}
	}
	return ports
}

// awaitController waits until a controller answers. The error is what the last try says.
func (a *app) awaitController(ctx context.Context, me *identity, limit time.Duration) error {
	last := errors.New("not asked yet")
	err := a.await(ctx, limit, func(ctx context.Context) bool {
		var c *session
		if c, last = a.connectAs(ctx, me); last != nil {
			return false
		}
		defer c.Close()
		last = c.Controller(ctx, protocol.ListNodes, protocol.Page{Limit: 1}, nil)
		return last == nil
	})
	if err != nil {
		return last
	}
	return nil
}
