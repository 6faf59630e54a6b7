package command

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/protocol"
)

// What `init` puts into the project's folder, below ownDir.
const (
	ownDir         = "nix-infra"
	fleetFile      = "fleet.json"
	keysDir        = "keys"
	knownHostsFile = "known_hosts"
	recipientsFile = "recipients" // whom the keys and secrets are encrypted to, in place of a password

	secretsDir = "secrets" // beside ownDir, where the earlier tool had it

	fleetEntry = "fleet" // in the vault: protocol.FleetKeys
	caEntry    = "ca"    // in the vault: provision.CA with its key
	adminEntry = "admin" // in the vault: credentials of the user that init made
)

func (a *app) own(elements ...string) string {
	return filepath.Join(append([]string{a.dir, ownDir}, elements...)...)
}

// fleet is the public half of the project's keys, as fleet.json holds it.
type fleet struct {
	Version int             `json:"v"`
	Public  protocol.Public `json:"public"`
	CA      string          `json:"ca"` // PEM

	verifier *protocol.Verifier // goes by Public as it was read
}

// readFleet reads fleet.json and checks that it hangs together.
func (a *app) readFleet() (*fleet, error) {
	path := a.own(fleetFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no %s; run nix-infra init -d %s", path, a.dir)
	} else if err != nil {
		return nil, err
	}
	f := &fleet{}
	if err := json.Unmarshal(data, f); err != nil {
		return nil, fmt.Errorf("%s is damaged (%v); remove it and run nix-infra init -d %s, which makes it from the keys", path, err, a.dir)
	}
	if f.Version != protocol.Version {
		return nil, fmt.Errorf("%s is of version %d, this program knows version %d; upgrade the older one", path, f.Version, protocol.Version)
	}
	if f.verifier, err = protocol.NewVerifier(f.Public.Operator, f.Public.AccountJWT); err != nil {
		return nil, fmt.Errorf("%s is damaged (%v); remove it and run nix-infra init -d %s, which makes it from the keys", path, err, a.dir)
	}
	return f, nil
}

// open opens the project's folder; with project.ErrNotInitialised there is a project of default settings.
func (a *app) open() (*project.Project, error) {
	if err := a.refuseLockedProject(); err != nil {
		return nil, err
	}
	p, err := project.Open(a.dir, a.envFile)
	if p != nil {
		p.Env.Process = a.Getenv
	}
	return p, err
}

func (a *app) openProject() (*project.Project, error) {
	p, err := a.open()
	if errors.Is(err, project.ErrNotInitialised) {
		return nil, fmt.Errorf("%s is not a project folder; name one with -d, or make it one with nix-infra init -d %s", a.dir, a.dir)
	}
	return p, err
}

// vault is the project's keys. The password is asked for when it is first needed, and once.
func (a *app) vault(getenv func(string) string) *vault.Vault {
	if a.keys == nil {
		ask := a.prompt
		if a.batch {
			ask = nil
		}
		options := append([]vault.Option{vault.Team(a.own(recipientsFile), getenv, ask)}, a.VaultOptions...)
		password := ask
		if ask != nil && vault.New(a.own(keysDir), nil).Empty() {
			password = vault.Twice(ask) // a new vault
		}
		a.keys = vault.New(a.own(keysDir), vault.Password(getenv, password), options...)
	}
	return a.keys
}

// secretStore is the project's secrets, which the same password or keys open.
func (a *app) secretStore(p *project.Project) *vault.Secrets {
	if a.secrets == nil {
		v := a.vault(p.Env.Get)
		legacy := func() (string, error) { return v.LegacyPassword(p.Env.Get) }
		a.secrets = v.Secrets(filepath.Join(a.dir, secretsDir), legacy, func(text string) { a.note("WARNING: %s", text) })
	}
	return a.secrets
}

// prompt asks for a password, where stdin is somebody to ask. Ctrl-C ends it and brings the echo back.
func (a *app) prompt(label string) (string, error) {
	in, ok := a.Stdin.(*os.File)
	if !ok || in != os.Stdin {
		return "", fmt.Errorf("%w, and nobody to ask: set %s in the environment or in .env", vault.ErrNoPassword, vault.Variable)
	}
	before, _ := term.GetState(int(in.Fd())) // an error means that it is no terminal, as Prompt will say
	type answer struct {
		password string
		err      error
	}
	typed := make(chan answer, 1)
	go func() {
		password, err := vault.Prompt(label)
		typed <- answer{password, err}
	}()
	select {
	case t := <-typed:
		return t.password, t.err
	case <-a.interrupted:
		if before != nil {
			term.Restore(int(in.Fd()), before)
		}
		return "", context.Canceled
	}
}

// typed is the next line that somebody types. Ctrl-C ends the wait for it.
func (a *app) typed() (string, error) {
	if a.answers == nil {
		a.answers = bufio.NewReader(a.Stdin)
	}
	type line struct {
		text string
		err  error
	}
	read := make(chan line, 1)
	go func() {
		text, err := a.answers.ReadString('\n')
		read <- line{strings.TrimSpace(text), err}
	}()
	select {
	case l := <-read:
		return l.text, l.err
	case <-a.interrupted:
		return "", context.Canceled
	}
}

// secret reads an entry of the vault and says what is missing or wrong where.
func (a *app) secret(v *vault.Vault, entry string) ([]byte, error) {
	data, err := v.Get(entry)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s is missing: restore it, or run nix-infra init -d %s", a.own(keysDir, entry+".age"), a.dir)
	case errors.Is(err, vault.ErrWrongPassword):
		return nil, fmt.Errorf("the password does not open %s; check %s", a.own(keysDir, entry+".age"), vault.Variable)
	}
	return data, err
}

// identity is as whom the fleet is spoken to.
type identity struct {
	protocol.Identity
	signer   *protocol.Signer
	issued   int64 // Unix seconds
	expires  int64 // Unix seconds, 0: never
	project  *project.Project
	fleet    *fleet
	verifier *protocol.Verifier
}

// identity finds the credentials and proves them against the project's fleet, before anybody else has to.
func (a *app) identity() (*identity, error) {
	p, err := a.openProject()
	if err != nil {
		return nil, err
	}
	f, err := a.readFleet()
	if err != nil {
		return nil, err
	}
	contents, from, err := a.credentials(p)
	if err != nil {
		return nil, err
	}
	signer, claims, err := protocol.ParseCredentials(contents)
	if err != nil {
		return nil, fmt.Errorf("%s is no credentials file: %w; restore it, or name another one by --creds or NIX_INFRA_CREDS", from, err)
	}
	who, err := f.verifier.Identify(signer.User, time.Now())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	return &identity{Identity: who, signer: signer, issued: claims.IssuedAt, expires: claims.Expires, project: p, fleet: f, verifier: f.verifier}, nil
}

// Credentials that end within a week are warned of, from the last quarter of their time on: those that were made for a
// day end soon from the beginning, as whoever has them knows.
const soon = 7 * 24 * time.Hour

func (me *identity) endsSoon(now time.Time) bool {
	left := time.Unix(me.expires, 0).Sub(now)
	return me.expires != 0 && left < soon && left < time.Duration(me.expires-me.issued)*time.Second/4
}

func (a *app) warnOfExpiry(me *identity) {
	if me.endsSoon(time.Now()) {
		a.note("the credentials of %s end at %s; ask for new ones (nix-infra access add)", me.Name, time.Unix(me.expires, 0).UTC().Format(time.RFC3339))
	}
}

func (a *app) credentials(p *project.Project) (contents []byte, from string, err error) {
	file := first(a.creds, a.Getenv("NIX_INFRA_CREDS"))
	if file == "" {
		contents, err := a.secret(a.vault(p.Env.Get), adminEntry)
		return contents, "the admin credentials in " + a.own(keysDir), err
	}
	contents, err = os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("there is no credentials file %s; check --creds and NIX_INFRA_CREDS", file)
	}
	return contents, file, err
}

// session is a connection, and as whom.
type session struct {
	*client.Client
	me *identity
}

// connect connects to the fleet of the project.
func (a *app) connect(ctx context.Context) (*session, error) {
	me, err := a.identity()
	if err != nil {
		return nil, err
	}
	return a.connectAs(ctx, me)
}

// connectAs is connect for an identity that was opened before.
func (a *app) connectAs(ctx context.Context, me *identity) (*session, error) {
	urls := me.project.Settings.Controllers
	if len(urls) == 0 {
		return nil, fmt.Errorf("the project has no controller yet: nix-infra provision (migrate, for machines that run NixOS) or nix-infra enroll NAME --controller makes one; the URL of one that runs belongs into %s (controllers)", project.SettingsFile)
	}
	if err := protocol.CheckControllers(urls); err != nil {
		return nil, fmt.Errorf("controllers in the project's nix-infra.yaml: %w", err)
	}
	a.warnOfExpiry(me)
	a.log.Debug("connecting", "controllers", urls, "user", me.Name, "role", me.Role)
	c, err := client.Connect(ctx, client.Config{URLs: urls, CA: []byte(me.fleet.CA), Signer: me.signer, Name: me.Name})
	if err != nil {
		return nil, err
	}
	return &session{c, me}, nil
}

// authority opens the private keys, which make machines and people part of the fleet.
func (a *app) authority(p *project.Project, f *fleet) (*provision.Authority, error) {
	v := a.vault(p.Env.Get)
	data, err := a.secret(v, fleetEntry)
	if err != nil {
		return nil, err
	}
	keys := &protocol.FleetKeys{}
	if err := json.Unmarshal(data, keys); err != nil {
		return nil, fmt.Errorf("the fleet's keys in %s are damaged: %v", a.own(keysDir), err)
	}
	bundle, err := a.secret(v, caEntry)
	if err != nil {
		return nil, err
	}
	ca, err := provision.ParseCA(bundle)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a.own(keysDir, caEntry), err)
	}
	return &provision.Authority{Keys: keys, Public: f.Public, CA: ca, Controllers: p.Settings.Controllers}, nil
}

// selected lists the nodes that selectors name, all without any.
func (a *app) selected(ctx context.Context, c *client.Client, selectors []string) ([]protocol.NodeState, error) {
	nodes, err := c.ListNodes(ctx)
	if err != nil || len(selectors) == 0 {
		return nodes, err
	}
	return selectFrom(nodes, selectors)
}

func selectFrom(nodes []protocol.NodeState, selectors []string) ([]protocol.NodeState, error) {
	candidates := make([]project.Candidate, len(nodes))
	byName := make(map[string]protocol.NodeState, len(nodes))
	for i := range nodes {
		candidates[i] = project.Candidate{Name: nodes[i].Name, Tags: nodes[i].Tags, Facts: facts(&nodes[i])}
		byName[nodes[i].Name] = nodes[i]
	}
	chosen, err := project.Select(selectors, candidates)
	if err != nil {
		return nil, err
	}
	some := make([]protocol.NodeState, len(chosen))
	for i, c := range chosen {
		some[i] = byName[c.Name]
	}
	return some, nil
}

// facts are what key=value in a selector is about.
func facts(n *protocol.NodeState) map[string]string {
	d := documentOf(n)
	return map[string]string{
		"node": d.Node, "state": d.State, "system": d.System, "nixos": d.NixOS, "kernel": d.Kernel, "agent": d.Agent,
		"ipv4": d.IPv4, "deployment": d.Deployment, "phase": string(d.Phase), "closure": d.Closure,
		"online": fmt.Sprint(d.Online), "reboot_needed": fmt.Sprint(d.RebootNeeded),
		"locked": fmt.Sprint(d.Lock != nil), "drift": fmt.Sprint(d.Drift != ""),
	}
}
