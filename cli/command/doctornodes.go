package command

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// doctorPatience is how long a node may take to answer one question.
const doctorPatience = 10 * time.Second

// checkNodes looks at what the controller knows of each node, and asks those that are there.
func (d *doctor) checkNodes(ctx context.Context) {
	d.area = "node"
	if d.session == nil {
		return // the controller's part says so
	}
	if len(d.nodes) == 0 {
		d.add(warning, "nodes", "online", "nix-infra provision, or nix-infra enroll", "there are none yet")
		return
	}
	var there []string
	for i := range d.nodes {
		if d.checkState(&d.nodes[i]); d.nodes[i].Online {
			there = append(there, d.nodes[i].Name)
		}
	}
	asked := time.Now()
	d.ask(ctx, there, protocol.Ping, nil, func(node string, r *protocol.Reply, err error) {
		if p := pinged(node, asked, time.Now(), r, err); p.Refused != "" {
			d.add(problem, node, "answers", "", "it refuses to answer: %s", p.Refused)
		} else {
			d.clock(node, "clock", time.Duration(p.Clock*float64(time.Second)))
		}
	})
	d.ask(ctx, there, protocol.ShowUnit, protocol.UnitQuery{Name: machine.AgentService}, d.checkUnit)
	d.ask(ctx, there, protocol.ReadFiles, protocol.FilesQuery{Path: "/"}, d.checkPolicy)
	d.checkClosed(ctx)
}

// ask asks nodes, and tells of those that don't answer.
func (d *doctor) ask(ctx context.Context, names []string, action protocol.Action, payload any, each func(node string, r *protocol.Reply, err error)) {
	ctx, cancel := context.WithTimeout(ctx, doctorPatience)
	defer cancel()
	silent, err := d.session.Put(ctx, client.Question{Nodes: names, Action: action, Payload: payload, End: true}, each)
	for _, node := range silent {
		d.add(problem, node, "answers", "look at its agent's log: journalctl -u nix-infra-agent, on the node", "it beats, but does not answer (%s)", action)
	}
	if err != nil {
		d.add(notSeen, strings.Join(names, " "), "answers", "", "%w", err)
	}
}

// checkState judges what the controller knows.
func (d *doctor) checkState(n *protocol.NodeState) {
	s := documentOf(n)
	name := n.Name
	switch {
	case n.Beat == nil:
		d.add(problem, name, "online", "see whether its agent runs: systemctl status nix-infra-agent, on the machine", "it was enrolled, and never heard of")
		return
	case !n.Online:
		d.add(problem, name, "online", "see whether the machine and its agent run, and reach the controller", "its heartbeats stopped; it was last seen %s ago", ago(n.LastSeen, time.Now()))
		return
	}
	d.add(fine, name, "online", "", "it is there")
	failed := s.State == string(protocol.FailedPhase) || s.State == string(protocol.RolledBack)
	switch {
	case failed:
		d.add(problem, name, "deployment", "nix-infra deployment show "+s.Deployment+" --log", "its last deployment ended %s: %s", s.State, s.Reason)
	case s.State == "pending":
		d.add(warning, name, "deployment", "nix-infra rollout watch", "it has not taken over deployment %s", s.DesiredDeployment)
	case s.State == "idle":
		d.add(warning, name, "deployment", "nix-infra deploy "+name, "nothing was deployed to it yet")
	default:
		d.add(fine, name, "deployment", "", "its last deployment is %s", s.State)
	}
	d.version(name, s.Agent)
	if s.Drift != "" && !failed { // a deployment that failed is a drift, too
		d.add(warning, name, "drift", "nix-infra drift "+name+"; nix-infra deploy "+name+" ends it", "it does not run what was deployed: %s", s.Drift)
	}
	if len(s.FailedUnits) > 0 {
		d.add(problem, name, "units", "nix-infra unit "+s.FailedUnits[0]+" "+name, "units have failed: %s", some(s.FailedUnits))
	} else {
		d.add(fine, name, "units", "", "no unit has failed")
	}
	if s.RebootNeeded {
		d.add(warning, name, "reboot", "nix-infra reboot "+name, "it runs another kernel than the one that it would boot")
	}
	if s.Lock != nil {
		d.add(warning, name, "lock", "nix-infra node unlock "+name, "it is locked %s", lockText(s.Lock))
	}
	if len(n.Beat.Quarantine) > 0 {
		d.add(warning, name, "quarantine", "nix-infra node release "+name+", once the cause is gone", "%s it rolled back from", plural(len(n.Beat.Quarantine), "system"))
	}
	if v := s.Vitals; v != nil {
		d.disk(name, "nix-infra gc "+name, v.DiskFree, v.DiskTotal)
	}
}

// checkUnit judges the unit of a node's agent: one that is not of the node's system is gone with the next boot.
func (d *doctor) checkUnit(node string, r *protocol.Reply, err error) {
	var u protocol.UnitStatus
	if err == nil {
		err = json.Unmarshal(r.Body, &u) // a newer agent may say more
	}
	switch {
	case err != nil:
		d.add(notSeen, node, "agent", "", "how long its agent lasts: %w", err)
	case strings.HasPrefix(u.File, machine.PassingUnits+"/"):
		d.add(warning, node, "agent", "deploy a configuration that has the agent's module (docs/nixos.md); without one, enroll it again after a boot", "its agent lasts until the next boot")
	default:
		d.add(fine, node, "agent", "", "its agent is there after a boot")
	}
}

// checkPolicy finds out whether a node's agent understands the node's policy. Any answer but that it failed says so: whether
// the folder may be seen is up to the policy.
func (d *doctor) checkPolicy(node string, _ *protocol.Reply, err error) {
	var r *protocol.Refusal
	if errors.As(err, &r) && r.Code == protocol.Failed {
		d.add(problem, node, "policy", "correct it in the node's configuration (docs/policy.md) and deploy", "it allows nobody anything: %s", r.Reason)
		return
	}
	d.add(fine, node, "policy", "", "its policy can be read")
}

// checkClosed knocks at port 22 of the nodes that are to have it closed.
func (d *doctor) checkClosed(ctx context.Context) {
	var mu sync.Mutex
	var knocks sync.WaitGroup
	slots := make(chan struct{}, 32)
	for _, n := range d.nodes {
		if !*d.project.Settings.Node(n.Name).CloseSSH || !n.Online {
			continue
		}
		knocks.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			address := d.address(&n)
			dialer := net.Dialer{Timeout: closedTime}
			var c net.Conn
			err := errors.New("its address is not known")
			if address != "" {
				c, err = dialer.DialContext(ctx, "tcp", address)
			}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case address == "":
				d.add(notSeen, n.Name, "ssh", "", "whether SSH is closed: %w", err)
			case err == nil:
				c.Close()
				d.add(problem, n.Name, "ssh", "look for what opens it beside close_ssh, such as networking.firewall.allowedTCPPorts", "%s takes connections from here, and close_ssh says that it should not", address)
			default:
				d.add(fine, n.Name, "ssh", "", "%s takes no connections from here", address)
			}
		})
	}
	knocks.Wait()
}

// address is where SSH would reach a node, "" where that is not known.
func (d *doctor) address(n *protocol.NodeState) string {
	settings := d.project.Settings.Nodes[n.Name]
	if a, err := project.ParseSSHAddress(settings.SSH); err == nil && settings.SSH != "" {
		return net.JoinHostPort(a.Host, strconv.Itoa(cmp.Or(a.Port, 22)))
	}
	host := first(settings.IPv4, documentOf(n).IPv4)
	servers, _ := d.project.Servers()
	if i := slices.IndexFunc(servers, func(s project.Server) bool { return s.Name == n.Name && s.IP != "" }); i >= 0 {
		host = servers[i].IP
	}
	if host == "" {
		return ""
	}
	return net.JoinHostPort(host, "22")
}
