package command

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/vault"
)

// lockedRecord, beside fleet.json, lists the files of the project that are locked.
const lockedRecord = "locked.json"

// folder is the project's folder, as it is locked and unlocked.
func (a *app) folder(getenv func(string) string) *vault.Folder {
	return a.vault(getenv).Folder(a.dir, a.own(lockedRecord))
}

// refuseLockedProject keeps commands from a project that is locked: they would miss its files, or make them anew.
func (a *app) refuseLockedProject() error {
	if _, err := os.Lstat(a.own(lockedRecord)); err == nil {
		return fmt.Errorf("the project in %s is locked; open it with nix-infra unlock", a.dir)
	}
	return nil
}

// noNodes points those who mean nodes to the command for them.
func noNodes(verb string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) > 0 {
			return fmt.Errorf("nix-infra %s is about the project's folder and takes no names; for nodes, use nix-infra node %s %s", verb, verb, strings.Join(args, " "))
		}
		return nil
	}
}

// lockedDocument is a file, in `lock --json` and `unlock --json`.
type lockedDocument struct {
	Path  string `json:"path"`
	State string `json:"state"` // locked, unlocked or, with --dry-run, private
}

func (a *app) lockCommand() *cobra.Command {
	var dryRun bool
	c := &cobra.Command{
		Use:   "lock",
		Short: "Encrypt the private files of the project's folder",
		Long: `Encrypt the private files of the project's folder that other programs need in clear: FILE becomes FILE.age, with the
project's password or to its team. These are the private keys in ssh/, all that is below a folder private/ and every
*.key.pem in ca/, .env, and *.creds. The keys in nix-infra/ and the secrets are always encrypted.

While the project is locked, other commands refuse to work on it. An interrupted lock loses nothing: run it again, or
unlock. What a disk keeps of a file that was removed is up to the disk: use an encrypted one.

For nodes that should not be deployed to, see nix-infra node lock.`,
		Example: `  nix-infra lock --dry-run
  nix-infra lock`,
		Args: noNodes("lock"),
		RunE: func(*cobra.Command, []string) error { return a.lockProject(dryRun) },
	}
	c.Flags().BoolVar(&dryRun, "dry-run", false, "only list the files")
	return c
}

func (a *app) unlockCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "unlock",
		Short: "Open the private files of the project's folder",
		Long:  `Open the files that nix-infra lock encrypted. A password that was in .env has to be typed, or be in the environment.`,
		Example: `  nix-infra unlock
  SECRETS_PASS="$(pass show shop)" nix-infra unlock --batch`,
		Args: noNodes("unlock"),
		RunE: func(*cobra.Command, []string) error { return a.unlockProject() },
	}
}

func (a *app) lockProject(dryRun bool) error {
	p, err := a.openThough()
	if err != nil {
		return err
	}
	files, err := privateFiles(a.dir)
	if err != nil {
		return err
	}
	if dryRun {
		for _, file := range files {
			a.toldLocked(file, "private")
		}
		return nil
	}
	legacy, err := a.secretStore(p).LegacyNames()
	if err != nil {
		return err
	}
	if len(legacy) > 0 {
		return fmt.Errorf("secrets of the earlier tool are in clear, or nearly: %s; run nix-infra secrets migrate first", some(legacy))
	}
	folder := a.folder(p.Env.Get)
	before, err := folder.Locked()
	if err != nil {
		return err
	}
	if len(files) == 0 && len(before) == 0 {
		a.say("there is nothing to lock\n")
		return nil
	}
	if slices.Contains(files, envFile) {
		if err := a.provePassword(p); err != nil {
			return err
		}
	}
	return folder.Lock(files, func(file string) { a.toldLocked(file, "locked") })
}

func (a *app) unlockProject() error {
	p, err := a.openThough()
	if err != nil {
		return err
	}
	folder := a.folder(p.Env.Get)
	locked, err := folder.Locked()
	if err != nil {
		return err
	}
	if len(locked) == 0 {
		a.say("nothing is locked\n")
		return nil
	}
	err = folder.Unlock(func(file string) { a.toldLocked(file, "unlocked") })
	if errors.Is(err, vault.ErrWrongPassword) || errors.Is(err, vault.ErrNoPassword) || errors.Is(err, vault.ErrNoKey) || err == nil {
		return err
	}
	return &outcome{SomeFailed, err}
}

func (a *app) toldLocked(file, state string) {
	if a.json {
		a.document(lockedDocument{file, state})
	}
	a.say("%s %s\n", state, file)
}

const envFile = ".env"

// openThough opens a project that may be locked, and its environment file with it.
func (a *app) openThough() (*project.Project, error) {
	file := a.envFile
	if _, err := os.Lstat(a.own(lockedRecord)); err == nil {
		if _, err := os.Stat(filepath.Join(a.dir, file)); err != nil && !filepath.IsAbs(file) {
			file = ""
		}
	}
	p, err := project.Open(a.dir, file)
	if errors.Is(err, project.ErrNotInitialised) {
		return nil, fmt.Errorf("%s is not a project folder; name one with -d", a.dir)
	} else if err != nil {
		return nil, err
	}
	p.Env.Process = a.Getenv
	return p, nil
}

// provePassword makes sure that somebody knows the password where the file that holds it gets locked with it.
func (a *app) provePassword(p *project.Project) error {
	v := a.vault(p.Env.Get)
	readers, _, err := v.Readers()
	if err == nil && v.Empty() {
		readers, err = v.Recipients() // of the key that is made now
	}
	if err != nil || len(readers) > 0 {
		return err
	}
	password := first(p.Env.Get(vault.Variable), p.Env.Get("SECRETS_PWD"))
	if known := first(a.Getenv(vault.Variable), a.Getenv("SECRETS_PWD")); password == "" || known == password {
		return nil
	}
	if a.batch {
		return fmt.Errorf("the password is in %s only, which would be locked with it: set %s in the environment, too", envFile, vault.Variable)
	}
	typed, err := a.prompt("The password is in " + envFile + ", which gets locked with it. Type it: ")
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare([]byte(typed), []byte(password)) != 1 {
		return errors.New("that is not the password in " + envFile + ", and nothing was locked: unlock would ask you for it")
	}
	return nil
}

// privateFiles lists the files of a project that are private and in clear, sorted: slash-separated, below dir.
func privateFiles(dir string) ([]string, error) {
	var found []string
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		top, _, below := strings.Cut(name, "/")
		switch {
		case e.IsDir() && (name == "." || name == "ssh" || name == ownDir || top == "ca"):
		case e.IsDir():
			return fs.SkipDir
		case e.Type().IsRegular() && isPrivateFile(name, top, below):
			found = append(found, name)
		}
		return nil
	})
	return found, err
}

func isPrivateFile(name, top string, below bool) bool {
	base := path.Base(name)
	switch {
	case strings.HasSuffix(name, ".age"):
		return false
	case !below:
		return name == envFile || strings.HasSuffix(name, ".creds")
	case top == ownDir:
		return strings.HasSuffix(name, ".creds")
	case top == "ssh":
		return !strings.HasSuffix(name, ".pub") && !strings.HasPrefix(base, "known_hosts") && base != "config"
	}
	return strings.HasSuffix(name, ".key.pem") || slices.Contains(strings.Split(path.Dir(name), "/"), "private")
}
