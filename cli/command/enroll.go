package command

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

type enrollOptions struct {
	ssh, sshKey      string
	agentBinary      string
	controllerBinary string
	tags             []string
	controller       bool
	addresses        []string
	offline          bool
	request, answer  string
	wait             time.Duration

	token, cloudInit, detach, pending, revokeToken bool
	out                                            string
	expires                                        time.Duration
}

func (a *app) enrollCommand() *cobra.Command {
	var o enrollOptions
	c := &cobra.Command{
		Use:   "enroll NAME --ssh [user@]host[:port] | enroll --token NAME | enroll --request FILE",
		Short: "Bring a machine into the fleet, as a node or a controller",
		Long: `Bring a machine into the fleet, as a node or, with --controller, as a controller.

Over SSH, which is needed only this once, the agent is uploaded, makes its keys on the machine, is
signed and started. The machine's host key is pinned in nix-infra/known_hosts at the first contact.

Without SSH, by a token: a machine that can open connections, and need not accept any, runs
"nix-infra-agent join" with it. A token is good for one machine, for the time of --expires, and is
secret: who has it first comes in first. This command waits for that machine and shows what comes;
with --detach it does not, and "enroll --pending" shows who waits, "enroll --pending NAME" lets it in.

By hand: the machine's administrator runs "nix-infra-agent request --name NAME", brings the output
here, and gives the answer to "nix-infra-agent load -". Enrolling again is safe: keys are kept.`,
		Example: `  nix-infra enroll --controller ctl --ssh root@ctl.example.org --address 192.0.2.1
  nix-infra enroll web1 --ssh root@192.0.2.10 --tag web
  nix-infra enroll db1 --ssh admin@192.0.2.11:2222 --ssh-key ~/.ssh/id_ed25519
  nix-infra enroll --token web3 --tag web | ssh web3 sudo nix-infra-agent join -
  nix-infra enroll --token web4 --expires 24h --cloud-init --out web4.yaml --detach
  nix-infra enroll --pending web4
  nix-infra enroll --request web2.request --answer web2.answer --tag web
  ssh web2 nix-infra-agent request --name web2 | nix-infra enroll --request - | ssh web2 nix-infra-agent load -`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return a.enroll(c.Context(), args, o) },
	}
	f := c.Flags()
	f.StringVar(&o.ssh, "ssh", "", "the machine as SSH reaches it: [user@]host[:port]; root, or a user who may sudo")
	f.StringVar(&o.sshKey, "ssh-key", "", "SSH key file, or the name of a key in the project's ssh folder")
	f.StringVar(&o.agentBinary, "agent-binary", "", "the agent to upload (default: the one beside this program)")
	f.StringVar(&o.controllerBinary, "controller-binary", "", "the controller to upload (default: the one beside this program)")
	f.StringArrayVar(&o.tags, "tag", nil, "tag of the node; repeatable")
	f.BoolVar(&o.controller, "controller", false, "enroll a controller instead of a node")
	f.StringArrayVar(&o.addresses, "address", nil, "name or IP address by which a controller is reached; repeatable")
	f.BoolVar(&o.offline, "offline", false, "with --request: don't tell the controller")
	f.StringVar(&o.request, "request", "", "file with the request that the machine printed, - for stdin")
	f.StringVar(&o.answer, "answer", "-", "file for the answer, - for stdout")
	f.BoolVar(&o.token, "token", false, "make a token by which a machine becomes the node NAME by itself")
	f.DurationVar(&o.expires, "expires", time.Hour, "with --token: how long it is good, up to 168h")
	f.StringVar(&o.out, "out", "", "with --token: write it to this file, which only you can read")
	f.BoolVar(&o.cloudInit, "cloud-init", false, "with --token: print user-data for a cloud image that has the agent")
	f.BoolVar(&o.detach, "detach", false, "with --token: don't wait for the machine")
	f.BoolVar(&o.pending, "pending", false, "let in the machine that came with the token for NAME; without NAME, list who waits")
	f.BoolVar(&o.revokeToken, "revoke-token", false, "take back the token for NAME")
	f.DurationVar(&o.wait, "wait", time.Minute, "how long to wait for the machine's first sign of life")
	return c
}

func (a *app) enroll(ctx context.Context, args []string, o enrollOptions) error {
	name := ""
	if len(args) == 1 {
		name = args[0]
		if err := project.ValidNodeName(name); err != nil {
			return err
		}
	}
	if err := (&protocol.TagsRequest{Tags: o.tags}).Validate(); err != nil {
		return fmt.Errorf("--tag: %w", err)
	}
	for _, h := range o.addresses {
		if h == "" || strings.ContainsAny(h, ":/ ") && net.ParseIP(h) == nil {
			return fmt.Errorf("--address %q: expected a name or an IP address", h)
		}
	}
	if err := o.oneWay(); err != nil {
		return err
	}
	switch {
	case o.token:
		return a.enrollToken(ctx, name, o)
	case o.pending:
		return a.enrollPending(ctx, name, o.wait)
	case o.revokeToken:
		return a.revokeToken(ctx, name)
	case o.request != "" && o.ssh != "":
		return errors.New("--request and --ssh are two ways of doing it; give one")
	case o.request != "":
		return a.enrollFile(ctx, name, o)
	case o.offline:
		return errors.New("--offline needs --request FILE, with what nix-infra-agent request printed")
	case o.ssh == "" || name == "":
		return errors.New("a NAME and --ssh [user@]host are needed, or --request FILE; see nix-infra enroll --help")
	case o.controller && len(o.tags) > 0:
		return errors.New("--tag is for nodes; a controller has none")
	}
	return a.enrollSSH(ctx, name, o)
}

// enrolment is what enrolling needs of the project, opened and checked before a machine is touched.
type enrolment struct {
	*provision.Authority
	me *identity
}

func (a *app) openEnrolment() (*enrolment, error) {
	me, err := a.identity()
	if err != nil {
		return nil, err
	}
	authority, err := a.authority(me.project, me.fleet)
	if err != nil {
		return nil, err
	}
	return &enrolment{authority, me}, nil
}

// steps shows what is being done.
type steps struct {
	live  *ui.Live
	name  string
	json  func(any)
	ended bool
}

// stepDocument is a step in `enroll --json`.
type stepDocument struct {
	Event string `json:"event"` // step
	Name  string `json:"name"`
	Step  string `json:"step"`
}

func (s *steps) begin(what string) {
	if s.json != nil {
		s.json(stepDocument{"step", s.name, what})
		return
	}
	s.live.Set(s.name, what, ui.Active)
}

// end says how it ended; what is said after that is not.
func (s *steps) end(what string, kind ui.Kind) {
	if s.json == nil && !s.ended {
		s.live.Set(s.name, what, kind)
		s.live.Close()
	}
	s.ended = true
}

func (a *app) steps(name, title string) *steps {
	if a.json {
		return &steps{name: name, json: a.document}
	}
	return &steps{name: name, live: a.out.Live(title)}
}

func (a *app) enrollSSH(ctx context.Context, name string, o enrollOptions) error {
	target, err := provision.ParseTarget(o.ssh)
	if err != nil {
		return err
	}
	e, err := a.openEnrolment()
	if err != nil {
		return err
	}
	target.KnownHosts = a.own(knownHostsFile)
	target.AgentSocket = a.Getenv("SSH_AUTH_SOCK")
	target.KeyFiles = a.sshKeys(o.sshKey, e.me.project)
	if o.controller {
		return a.enrollController(ctx, e, name, target, o)
	}
	return a.enrollNode(ctx, e, name, target, o)
}

// sshKeys are the key files to try: the named one, or the project's.
func (a *app) sshKeys(named string, p *project.Project) []string {
	inProject := func(key string) string { return filepath.Join(a.dir, "ssh", key) }
	switch {
	case named == "":
		return []string{inProject(p.SSHKeyName())}
	case !strings.ContainsRune(named, filepath.Separator):
		return []string{inProject(named), named}
	}
	return []string{named}
}

func (a *app) enrollNode(ctx context.Context, e *enrolment, name string, target provision.Target, o enrollOptions) (err error) {
	s := a.steps(name, "enrolling "+name)
	defer func() {
		if err != nil {
			s.end("not enrolled", ui.Bad)
		}
	}()
	s.begin("connect to the controller")
	fleet, err := a.connectAs(ctx, e.me)
	if err != nil {
		return err
	}
	defer fleet.Close()
	before, err := known(ctx, fleet, name)
	if err != nil {
		return err
	}
	s.begin("connect to " + target.Address())
	m, err := provision.Dial(ctx, target)
	if err != nil {
		return err
	}
	defer m.Close()
	n := &newcomer{name: name, machine: m, host: target.Host, binary: o.agentBinary, step: s.begin}
	lasting, err := n.becomeNode(ctx, e, fleet, before, o.tags)
	if err != nil {
		return err
	}
	if err := provision.PinNode(target.KnownHosts, name, m.HostKey); err != nil {
		return err
	}
	s.begin("wait for its first sign of life")
	if err := a.await(ctx, o.wait, func(ctx context.Context) bool { return heard(ctx, fleet, name, before) }); err != nil {
		return a.didNotCome(ctx, s, m, provision.Agent, name, o.wait, err)
	}
	s.end("enrolled", ui.Good)
	a.tellHostKey(m, name)
	a.enrolled(name, protocol.Node, lasting)
	return nil
}

// tellHostKey tells of a host key that was taken on trust: who stood between at that moment has been enrolled in the machine's place.
func (a *app) tellHostKey(m *provision.Machine, name string) {
	if m.Unknown {
		a.note("the host key of %s was not known, and the one that was shown is pinned: %s %s; compare it with what the machine's console says", name, m.HostKey.Type(), ssh.FingerprintSHA256(m.HostKey))
	}
}

// enrolledDocument is the end of `enroll --json`.
type enrolledDocument struct {
	Event   string        `json:"event"` // enrolled
	Name    string        `json:"name"`
	Role    protocol.Role `json:"role"`
	Lasting bool          `json:"lasting"`
}

// enrolled says that it is done, and what is left to do.
func (a *app) enrolled(name string, role protocol.Role, lasting bool) {
	if a.json {
		a.document(enrolledDocument{"enrolled", name, role, lasting})
	}
	if !lasting {
		a.say("%s runs until the next boot; %s\n", name, map[protocol.Role]string{
			protocol.Node:       "a deployment brings it for good",
			protocol.Controller: "a deployment to the node on the same machine brings it for good",
		}[role])
	}
}

// didNotCome says why a machine that was set up does not show itself, by its own log.
func (a *app) didNotCome(ctx context.Context, s *steps, m *provision.Machine, p provision.Program, name string, waited time.Duration, err error) error {
	s.end("no sign of life", ui.Bad)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	a.printLog(provision.Log(ctx, m, p))
	return &outcome{Unanswered, fmt.Errorf("%s was set up and started, and in %s nothing was heard of it (%w); look at journalctl -u %s there", name, waited, err, p.Name)}
}

// known is what the controller knows of a node, nil if nothing.
func known(ctx context.Context, c *session, name string) (*protocol.NodeState, error) {
	n, err := c.Node(ctx, name)
	if errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) {
		return nil, nil
	}
	return n, err
}

// register tells the controller of a node, with the tags and the address that the project's settings
// have for it. One that is enrolled again keeps its own unless others are given.
func register(ctx context.Context, c *session, before *protocol.NodeState, r *protocol.EnrolRequest, jwt, ipv4 string, tags []string) error {
	settings := c.me.project.Settings.Nodes[r.Name]
	tags = slices.Compact(slices.Sorted(slices.Values(slices.Concat(tags, settings.Tags))))
	ipv4 = first(settings.IPv4, ipv4)
	record := protocol.NodeRecord{Name: r.Name, Key: r.Key, XKey: r.XKey, JWT: jwt, Tags: tags, IPv4: first(ipv4, r.IPv4), System: r.System, Enrolled: time.Now().UTC(), By: c.me.Name}
	if before != nil {
		if len(tags) == 0 {
			record.Tags = before.Tags
		}
		if ipv4 == "" {
			record.IPv4 = first(before.IPv4, r.IPv4)
		}
	}
	if err := c.Controller(ctx, protocol.PutNode, record, nil); err != nil {
		return fmt.Errorf("register %s with the controller: %w", r.Name, err)
	}
	return keepNode(c.me.project.Dir, r.Name, jwt)
}

// nodesDir, beside fleet.json, has the JWT of each node that was enrolled from here, which proves its keys: for what is
// done without a controller. It is public.
const nodesDir = "nodes"

func keepNode(dir, name, jwt string) error {
	folder := filepath.Join(dir, ownDir, nodesDir)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(folder, name+".jwt"), []byte(jwt+"\n"), 0o644)
}

// heard tells whether a node was heard of since before. The controller's own times are compared, so
// that no other clock matters.
func heard(ctx context.Context, c *session, name string, before *protocol.NodeState) bool {
	n, err := c.Node(ctx, name)
	if err != nil || !n.Online || n.LastSeen == nil {
		return false
	}
	return before == nil || before.LastSeen == nil || n.LastSeen.After(*before.LastSeen)
}

// await polls until something is so.
func (a *app) await(ctx context.Context, limit time.Duration, so func(context.Context) bool) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	ticker := time.NewTicker(500 * time.Millisecond)
	defer ticker.Stop()
	for !so(ctx) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
	return nil
}

func (a *app) enrollController(ctx context.Context, e *enrolment, name string, target provision.Target, o enrollOptions) (err error) {
	s := a.steps(name, "enrolling controller "+name)
	defer func() {
		if err != nil {
			s.end("not enrolled", ui.Bad)
		}
	}()
	s.begin("connect to " + target.Address())
	m, err := provision.Dial(ctx, target)
	if err != nil {
		return err
	}
	defer m.Close()
	n := &newcomer{name: name, machine: m, host: target.Host, binary: o.controllerBinary, step: s.begin}
	lasting, err := n.becomeController(ctx, a, e, o.addresses)
	if err != nil {
		return err
	}
	s.begin("wait until it answers")
	if err := a.awaitController(ctx, e.me, o.wait); err != nil {
		return a.didNotCome(ctx, s, m, provision.Controller, name, o.wait, err)
	}
	s.end("answers", ui.Good)
	a.tellHostKey(m, name)
	a.enrolled(name, protocol.Controller, lasting)
	return nil
}

// hosts are what a controller's certificate is for: its name, how it is reached, and every host in the
// fleet's URLs, since controllers may share a name there.
func hosts(name, host string, addresses, urls []string) []string {
	all := []string{name, "localhost", "127.0.0.1"}
	if host != "" {
		all = append(all, host)
	}
	all = append(all, addresses...)
	for _, s := range urls {
		if u, err := url.Parse(s); err == nil && u.Hostname() != "" {
			all = append(all, u.Hostname())
		}
	}
	slices.Sort(all[1:]) // the name stays first: it is the certificate's subject
	return slices.Compact(all)
}
