package command

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/nats-io/jwt/v2"
	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/examples"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

type initOptions struct {
	fleet, nixosVersion, user string
	controllers               []string
	sshKey, sshEmail          string
	noCertAuth                bool
	template, name            string
	force, fetch              bool
}

func (a *app) initCommand() *cobra.Command {
	var o initOptions
	c := &cobra.Command{
		Use:   "init",
		Short: "Make a folder a project: keys, CA, settings",
		Long: `Make a folder a project: the fleet's keys, its own CA, credentials for you, an SSH key and the settings.

The private keys are encrypted with the project's password: SECRETS_PASS, else SECRETS_PWD, else you
are asked. What exists is kept, so that running it again is safe and completes what was interrupted.

With --fetch it also brings the script that makes other machines NixOS machines (nix-infra provision): nixos-infect, of the
commit and with the SHA-256 that nix-infra.yaml pins (provision.infect), or else this program.

With --template it also writes a project to start from: fleet has machines that stand alone, cluster has etcd, an
overlay network and a service mesh. Its README.md tells how to go on.`,
		Example: `  nix-infra init -d ./shop --template fleet --name shop
  nix-infra init --fleet shop --controller tls://ctl.example.org:4222 --controller wss://ctl.example.org:443
  nix-infra init --fetch
  nix-infra init -d ./shop --env=.env --batch`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.init(c.Context(), o) },
	}
	f := c.Flags()
	f.StringVar(&o.fleet, "fleet", "", "name of the fleet (default: the folder's name)")
	f.StringArrayVar(&o.controllers, "controller", nil, "URL of a controller, such as tls://host:4222 or wss://host:443; repeatable")
	f.StringVar(&o.nixosVersion, "nixos-version", "", "NixOS version of the nodes, such as 25.11")
	f.StringVar(&o.user, "user", "", "your name in the fleet (default: your login name)")
	f.StringVar(&o.sshKey, "ssh-key", "", "`name` of the SSH key below ssh/ (default $SSH_KEY, else nixinfra)")
	f.StringVar(&o.sshEmail, "ssh-email", "", "comment of the SSH key's public half (default $SSH_EMAIL, else its name)")
	f.StringVar(&o.template, "template", "", "also write the files of a `template`: "+strings.Join(examples.Names, " or "))
	f.StringVar(&o.name, "name", "", "another word for --fleet")
	f.BoolVar(&o.force, "force", false, "with --template: replace files that are there already")
	f.BoolVar(&o.fetch, "fetch", false, "also download the pinned conversion script")
	f.BoolVar(&o.noCertAuth, "no-cert-auth", false, "accepted for scripts of the earlier tool; changes nothing")
	return c
}

func (a *app) init(ctx context.Context, o initOptions) (err error) {
	if err := o.check(); err != nil {
		return err
	}
	if len(o.controllers) > 0 {
		if err := protocol.CheckControllers(o.controllers); err != nil {
			return fmt.Errorf("--controller: %w", err)
		}
	}
	made := missing(a.own())
	defer func() {
		if err != nil {
			for _, dir := range made {
				os.Remove(dir) // stays if anything is in it
			}
		}
	}()
	p, fresh, err := a.openForInit(&o)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(a.own(), 0o755); err != nil {
		return err
	}
	v := a.vault(p.Env.Get)
	keys, err := a.initKeys(v, o.fleet)
	if err != nil {
		return err
	}
	ca, err := a.initCA(v, keys.Name)
	if err != nil {
		return err
	}
	if err := a.initAdmin(v, keys, o.user); err != nil {
		return err
	}
	if err := a.initMCP(keys); err != nil {
		return err
	}
	if err := a.alone(func() error { return a.initFleet(keys, ca) }); err != nil {
		return err
	}
	key := first(o.sshKey, p.SSHKeyName())
	if err := a.initSSHKey(key, first(o.sshEmail, first(p.Env.Get("SSH_EMAIL"), key))); err != nil {
		return err
	}
	if o.template != "" {
		if err := a.initTemplate(o.template, o.force); err != nil {
			return err
		}
	}
	if err := a.initIgnore(); err != nil {
		return err
	}
	p.Settings.Fleet = keys.Name
	if err := a.finishInit(p, fresh, o); err != nil {
		return err
	}
	if o.fetch {
		if err := a.fetchInfect(ctx, p); err != nil {
			return err
		}
	}
	if o.template == "" {
		return nil
	}
	if !fresh {
		a.note("%s was there already and was left as it is; in a new project, the template %s sets defaults.node_module and close_ssh in it, and cluster and nodes for one of a cluster", project.SettingsFile, o.template)
	}
	return a.initLock(ctx, o.template)
}

// missing are a folder and those around it, as far as they don't exist, from the inside out.
func missing(dir string) []string {
	var dirs []string
	for {
		if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
			return dirs
		}
		dirs, dir = append(dirs, dir), filepath.Dir(dir)
	}
}

// openForInit opens the folder, makes it where it is missing, and makes up the names that were not given.
func (a *app) openForInit(o *initOptions) (p *project.Project, fresh bool, err error) {
	if err := os.MkdirAll(a.dir, 0o755); err != nil {
		return nil, false, err
	}
	p, err = a.open()
	if fresh = errors.Is(err, project.ErrNotInitialised); err != nil && !fresh {
		return nil, false, err
	}
	o.fleet = first(p.Settings.Fleet, first(o.fleet, nameFrom(filepath.Base(p.Dir), "fleet")))
	o.user = first(o.user, nameFrom(first(a.Getenv("USER"), a.Getenv("LOGNAME")), "admin"))
	if err := protocol.CheckName(o.fleet); err != nil {
		return nil, false, fmt.Errorf("--fleet: %w", err)
	}
	if err := protocol.CheckName(o.user); err != nil {
		return nil, false, fmt.Errorf("--user: %w", err)
	}
	p.Settings.Fleet = o.fleet
	p.Settings.SSHKey = first(o.sshKey, p.Settings.SSHKey)
	if fresh {
		p.Settings.Controllers, p.Settings.Defaults.NixOSVersion = o.controllers, o.nixosVersion
		if o.template != "" {
			p.Settings.ApplyTemplate(o.template)
		}
	}
	return p, fresh, p.Settings.Validate()
}

// finishInit writes the settings, last: they are what makes the folder a project.
func (a *app) finishInit(p *project.Project, fresh bool, o initOptions) error {
	path := filepath.Join(a.dir, project.SettingsFile)
	if fresh {
		if err := project.WriteSettings(a.dir, p.Settings); err != nil {
			return err
		}
	}
	a.told("settings", path, !fresh)
	if !fresh && (len(o.controllers) > 0 || o.nixosVersion != "" || o.sshKey != "") {
		a.note("--controller, --nixos-version and --ssh-key change nothing in a project that has settings; edit %s", path)
	}
	return nil
}

var notInName = regexp.MustCompile(`[^a-z0-9]+`)

// nameFrom makes a name of something that people chose for another purpose.
func nameFrom(s, otherwise string) string {
	s = notInName.ReplaceAllString(strings.ToLower(s), "-")
	s = strings.Trim(s[:min(len(s), 60)], "-")
	if protocol.CheckName(s) != nil {
		return otherwise
	}
	return s
}

// toldDocument is a thing that a project needs, in `init --json`.
type toldDocument struct {
	What  string `json:"what"`
	Path  string `json:"path"`
	State string `json:"state"` // made or kept
}

func (a *app) told(what, path string, existed bool) {
	verb := "made"
	if existed {
		verb = "kept"
	}
	if a.json {
		a.document(toldDocument{what, path, verb})
	}
	a.say("%s %s: %s\n", verb, what, path)
}

func (a *app) initKeys(v *vault.Vault, fleet string) (*protocol.FleetKeys, error) {
	keys := &protocol.FleetKeys{}
	existed := v.Has(fleetEntry)
	if existed {
		data, err := a.secret(v, fleetEntry)
		if err != nil {
			return nil, err
		}
		if err := json.Unmarshal(data, keys); err != nil {
			return nil, fmt.Errorf("the fleet's keys in %s are damaged: %v", a.own(keysDir), err)
		}
	} else {
		var err error
		if keys, err = protocol.NewFleet(fleet); err != nil {
			return nil, err
		}
		if err := v.Put(fleetEntry, protocol.Encode(keys)); err != nil {
			return nil, err
		}
	}
	a.told("keys of fleet "+keys.Name, a.own(keysDir), existed)
	return keys, nil
}

func (a *app) initCA(v *vault.Vault, fleet string) (*provision.CA, error) {
	if v.Has(caEntry) {
		bundle, err := a.secret(v, caEntry)
		if err != nil {
			return nil, err
		}
		ca, err := provision.ParseCA(bundle)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", a.own(keysDir, caEntry), err)
		}
		a.told("CA", a.own(keysDir), true)
		return ca, nil
	}
	ca, err := provision.NewCA(fleet, time.Now())
	if err != nil {
		return nil, err
	}
	bundle, err := ca.Private()
	if err != nil {
		return nil, err
	}
	if err := v.Put(caEntry, bundle); err != nil {
		return nil, err
	}
	a.told("CA", a.own(keysDir), false)
	return ca, nil
}

func (a *app) initAdmin(v *vault.Vault, keys *protocol.FleetKeys, user string) error {
	existed := v.Has(adminEntry)
	var creds []byte
	var err error
	if existed {
		creds, err = a.secret(v, adminEntry)
	} else if creds, err = keys.Credentials(user, protocol.Admin, time.Time{}); err == nil {
		err = v.Put(adminEntry, creds)
	}
	if err != nil && !existed {
		return err
	}
	var claims *jwt.UserClaims
	if err == nil {
		_, claims, err = protocol.ParseCredentials(creds)
	}
	if err != nil {
		path := a.own(keysDir, adminEntry+".age")
		return fmt.Errorf("%w; or remove %s and run this again, which makes new credentials", err, path)
	}
	err = a.changeAccess(func(r *accessRecord) error {
		if !slices.ContainsFunc(r.Grants, func(g grant) bool { return g.Key == claims.Subject }) {
			r.Grants = append(r.Grants, grant{Name: claims.Name, Role: protocol.Admin, Key: claims.Subject, By: claims.Name, At: time.Unix(claims.IssuedAt, 0).UTC()})
		}
		return nil
	})
	if err != nil {
		return err
	}
	a.told("admin credentials", a.own(keysDir), existed)
	return nil
}

// initFleet writes the public half of the keys, with all that was ever revoked. One that belongs to other keys is not touched.
func (a *app) initFleet(keys *protocol.FleetKeys, ca *provision.CA) error {
	record, err := a.readAccess()
	if err != nil {
		return err
	}
	public, err := keys.Publish(record.revocations())
	if err != nil {
		return err
	}
	path := a.own(fleetFile)
	if _, err := os.Stat(path); err == nil {
		old, err := a.readFleet()
		if err != nil {
			return err
		}
		if old.Public.Operator != public.Operator || old.CA != string(ca.Public()) {
			return fmt.Errorf("%s does not belong to the keys in %s; restore the one that does, or remove %s and run this again", path, a.own(keysDir), path)
		}
		a.told("public keys", path, true)
		return nil
	}
	if err := a.writeFleet(public, ca); err != nil {
		return err
	}
	a.told("public keys", path, false)
	return nil
}

// initSSHKey makes the key pair that machines are reached with until they are enrolled. What is there of one is kept: the
// public half may be on machines already, and the other half with somebody else.
func (a *app) initSSHKey(name, comment string) error {
	if strings.ContainsFunc(comment, unicode.IsControl) {
		return fmt.Errorf("--ssh-email or SSH_EMAIL %q: use one line of text", comment)
	}
	path := filepath.Join(a.dir, "ssh", name)
	private, err := os.ReadFile(path)
	if existed := err == nil; existed {
		err = a.initPublicKey(path, comment, private)
		a.told("SSH key", path, true)
		return err
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(path + ".pub"); err == nil {
		a.told("SSH key's public half, whose private one is not here", path+".pub", true)
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	block, err := ssh.MarshalPrivateKey(key, comment)
	if err != nil {
		return err
	}
	private = pem.EncodeToMemory(block)
	if err := atomicfile.Write(path, private, 0o600); err != nil {
		return err
	}
	if err := a.initPublicKey(path, comment, private); err != nil {
		return err
	}
	a.told("SSH key", path, false)
	return nil
}

// initPublicKey makes the public half of a key where it is missing.
func (a *app) initPublicKey(path, comment string, private []byte) error {
	if _, err := os.Stat(path + ".pub"); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key, err := ssh.ParsePrivateKey(private)
	if err != nil {
		return fmt.Errorf("%s.pub is missing, and can't be made of the private key (%w); ssh-keygen -y -f %s prints it", path, err, path)
	}
	line := append(bytes.TrimSpace(ssh.MarshalAuthorizedKey(key.PublicKey())), " "+comment+"\n"...)
	return atomicfile.Write(path+".pub", line, 0o644)
}

// ignore keeps out of the repository what must not be seen. The keys are encrypted and may be in it.
const ignore = ".env\nssh/\n*.creds\n*.log\n"

func (a *app) initIgnore() error {
	path := filepath.Join(a.dir, ".gitignore")
	if _, err := os.Lstat(path); err == nil {
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := atomicfile.Write(path, []byte(ignore), 0o644); err != nil {
		return err
	}
	a.told("list of what git leaves out", path, false)
	return nil
}
