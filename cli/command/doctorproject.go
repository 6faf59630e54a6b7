package command

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// nobody is an address of no machine, by which a node's files can be composed whose own is not known here.
const nobody = "192.0.2.0"

func (d *doctor) checkProject(ctx context.Context) {
	if servers, err := d.project.Servers(); err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			d.add(problem, project.ServersFile, "servers", "", "%s", line)
		}
		return // no node can be composed either
	} else if len(servers) > 0 {
		d.add(fine, project.ServersFile, "servers", "", "%s", plural(len(servers), "machine"))
	}
	d.checkTrees()
	d.checkNames()
	d.checkPermissions()
	d.checkMachinesKeys()
	d.checkGit(ctx)
	d.checkSecrets()
	d.checkLock()
	d.checkHostKeys()
}

// checkTrees composes what a deployment would bring to each node.
func (d *doctor) checkTrees() {
	t := &trees{project: d.project, secrets: d.secretStore(d.project), known: nodeFacts(d.every), control: d.project.ControlNodes()}
	unknown := d.session == nil
	for i := range t.known {
		if k := &t.known[i]; unknown {
			k.IPv4, k.OverlayIP = first(k.IPv4, nobody), first(k.OverlayIP, nobody)
		}
	}
	if unknown && len(t.known) > 0 {
		d.add(notSeen, "nodes/", "placeholders", "", "the addresses of nodes that no file of the project has: they are the controller's to tell")
	}
	warned := map[string]bool{}
	nodes := d.nodes
	if len(d.every) == 0 { // what each of them would get is there all the same
		nodes = []protocol.NodeState{{NodeRecord: protocol.NodeRecord{Name: "any-node"}}}
	}
	for _, n := range nodes {
		r := t.request(n.Name)
		r.TrustedKeys = func() ([]string, error) { return nil, nil } // they may need the password
		tree, err := d.project.Tree(r)
		if err != nil {
			for line := range strings.SplitSeq(err.Error(), "\n") {
				d.add(problem, n.Name, "placeholders", "", "%s", line)
			}
			continue
		}
		d.add(fine, n.Name, "placeholders", "", "its files can be composed: %d", len(tree.Files))
		for _, w := range tree.Warnings {
			if !warned[w] {
				warned[w] = true
				d.add(warning, n.Name, "placeholders", "", "%s", w)
			}
		}
	}
}

// checkNames looks for files in nodes/ that are no node's, by their names: nothing would ever take them.
func (d *doctor) checkNames() {
	found, _ := filepath.Glob(filepath.Join(d.dir, "nodes", "*.nix"))
	for _, path := range found {
		name := strings.TrimSuffix(filepath.Base(path), ".nix")
		if err := project.ValidNodeName(name); err != nil {
			d.add(warning, "nodes/"+name+".nix", "names", "rename it", "no node can have it: %w", err)
		}
	}
}

// checkMachinesKeys looks for the keys by which servers.yaml says that machines are reached.
func (d *doctor) checkMachinesKeys() {
	servers, _ := d.project.Servers()
	missing := map[string]bool{filepath.Join(d.dir, "ssh", d.project.SSHKeyName()): true} // told of already
	for _, s := range servers {
		path := s.SSHKey
		if !filepath.IsAbs(path) {
			path = filepath.Join(d.dir, path)
		}
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) && !missing[path] {
			missing[path] = true
			d.add(warning, fmt.Sprintf("%s:%d", project.ServersFile, s.Line), "ssh-key", "restore it, or correct ssh_key", "the SSH key by which %s is brought in is not here: %s", s.Name, path)
		}
	}
}

// checkPermissions looks at files that nobody else may read.
func (d *doctor) checkPermissions() {
	private := []string{filepath.Join(d.dir, ".env")}
	for _, pattern := range []string{"*.creds", "nix-infra/*.creds", "ssh/*", "ca/private/*", "ca/intermediate/private/*.key.pem"} {
		found, _ := filepath.Glob(filepath.Join(d.dir, pattern))
		private = append(private, found...)
	}
	open := 0
	for _, path := range private {
		info, err := os.Lstat(path)
		if err != nil || !info.Mode().IsRegular() || strings.HasSuffix(path, ".pub") || strings.HasSuffix(path, ".age") {
			continue
		}
		if mode := info.Mode().Perm(); mode&0o077 != 0 {
			open++
			d.add(problem, path, "permissions", "chmod 600 "+quoteWords([]string{path}), "others on this machine can read it (its mode is %04o)", mode)
		}
	}
	if open == 0 {
		d.add(fine, d.dir, "permissions", "", "nobody else can read its private files")
	}
	key := filepath.Join(d.dir, "ssh", d.project.SSHKeyName())
	if _, err := os.Stat(key); errors.Is(err, fs.ErrNotExist) {
		d.add(warning, key, "ssh-key", "nix-infra init makes one; or restore it, or name another by SSH_KEY", "the SSH key by which machines are brought in is not here")
	}
}

// checkGit asks git whether it would see what must stay private. A repository can name programs that git runs, even for this:
// none is, since the project may be somebody else's, which is looked at before it is trusted.
func (d *doctor) checkGit(ctx context.Context) {
	git := func(args ...string) (string, error) {
		out, err := exec.CommandContext(ctx, "git", append([]string{"-C", d.dir, "-c", "core.fsmonitor=false", "-c", "core.hooksPath=" + os.DevNull}, args...)...).Output()
		return strings.TrimSpace(string(out)), err
	}
	if _, err := exec.LookPath("git"); err != nil {
		if _, err := os.Stat(filepath.Join(d.dir, ".git")); err == nil {
			d.add(notSeen, ".gitignore", "git", "", "there is no git here to ask what it would see")
		}
		return
	}
	if in, err := git("rev-parse", "--is-inside-work-tree"); err != nil || in != "true" {
		return
	}
	names := []string{".env", "ssh/" + d.project.SSHKeyName(), "nix-infra/admin.creds"}
	for _, name := range names {
		if _, err := git("ls-files", "--error-unmatch", "--", name); err == nil {
			d.add(problem, name, "git", "git rm --cached "+name+", and change what is in it: it stays in the history", "it is in the repository, where it must not be")
		} else if _, err := git("check-ignore", "-q", "--", name); err != nil {
			d.add(warning, ".gitignore", "git", "echo "+ignoreLine(name)+" >> .gitignore", "git would add %s, which must stay private", name)
		} else {
			d.add(fine, name, "git", "", "git leaves it out")
		}
	}
}

func ignoreLine(name string) string {
	switch {
	case strings.HasPrefix(name, "ssh/"):
		return "ssh/"
	case strings.HasSuffix(name, ".creds"):
		return "'*.creds'"
	}
	return name
}

// checkSecrets looks for secrets as far as no password is needed for it; secrets check opens them, too.
func (d *doctor) checkSecrets() {
	s := d.secretStore(d.project)
	names, err := s.Names()
	if err != nil {
		d.add(problem, secretsDir, "secrets", "", "%w", err)
		return
	}
	uses, err := usesOf(d.project)
	if err != nil {
		return // the node's tree has the same mistake
	}
	wrong := 0
	found := func(l level, name, do, format string, args ...any) {
		wrong++
		d.add(l, secretsDir+"/"+name, "secrets", do, format, args...)
	}
	for _, name := range slices.Sorted(maps.Keys(uses)) {
		if !s.Has(name) {
			found(problem, name, "nix-infra secrets store "+name, "%s names it, and it is not there", uses[name][0].At)
		}
	}
	legacy, err := s.LegacyNames()
	if err != nil {
		d.add(problem, secretsDir, "secrets", "", "%w", err)
	}
	for _, name := range names {
		doc := documentOfSecret(d.project, s, name, uses)
		if slices.Contains(legacy, name) {
			found(problem, name, "nix-infra secrets migrate", "it is stored as the earlier tool did, which is no encryption")
		}
		if doc.Due != nil && time.Now().After(*doc.Due) {
			found(warning, name, "nix-infra secrets rotate "+name, "it should have been rotated by %s", doc.Due.Format(time.DateOnly))
		}
		if doc.Pending {
			found(warning, name, "nix-infra secrets rotate "+name+" --resume", "its rotation was interrupted")
		}
	}
	if wrong == 0 {
		d.add(fine, secretsDir, "secrets", "", "%s, none missing or due", plural(len(names), "secret"))
	}
}

// checkLock looks whether all nodes build the same sources, and those of their release.
func (d *doctor) checkLock() {
	data, err := os.ReadFile(filepath.Join(d.dir, lockFile))
	if errors.Is(err, fs.ErrNotExist) {
		d.add(warning, lockFile, "lock", "copy /etc/nixos/"+lockFile+" of a node that is as it should be", "there is none: each node locks its sources by itself, and they drift apart")
		return
	} else if err != nil {
		d.add(problem, lockFile, "lock", "", "%w", err)
		return
	}
	var lock struct {
		Nodes map[string]struct {
			Original struct {
				Ref string `json:"ref"`
			} `json:"original"`
		} `json:"nodes"`
	}
	if err := json.Unmarshal(data, &lock); err != nil || lock.Nodes == nil {
		d.add(problem, lockFile, "lock", "restore it, or remove it and have Nix make it anew", "it is no lock of a flake")
		return
	}
	ref := lock.Nodes["nixpkgs"].Original.Ref
	for _, n := range d.nodes {
		if v := d.project.Settings.Node(n.Name).NixOSVersion; v != "" && strings.HasPrefix(ref, "nixos-") && ref != "nixos-"+v {
			d.add(warning, lockFile, "lock", "renew it for "+v, "it locks nixpkgs at %s, and %s is to have %s", ref, n.Name, v)
			return
		}
	}
	d.add(fine, lockFile, "lock", "", "all nodes build the same sources")
}

// checkHostKeys looks for pinned host keys of nodes that are gone: another machine of that name would be refused.
func (d *doctor) checkHostKeys() {
	file := d.own(knownHostsFile)
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return // nothing is pinned yet
	}
	if err == nil {
		_, err = knownhosts.New(file)
	}
	if err != nil {
		d.add(problem, file, "host-keys", "correct or remove what is damaged in it", "no machine is reached by SSH before it can be read: %w", err)
		return
	}
	if d.session == nil {
		d.add(notSeen, file, "host-keys", "", "whether all of them are of nodes that there are: the controller lists them")
		return
	}
	named := d.namedNodes()
	stale := 0
	for line := range bytes.Lines(data) {
		name, ok := strings.CutSuffix(strings.SplitN(string(line), " ", 2)[0], "@nix-infra")
		isNode := func(n protocol.NodeState) bool { return n.Name == name }
		if ok && !slices.Contains(named, name) && !slices.ContainsFunc(d.every, isNode) {
			stale++
			d.add(warning, file, "host-keys", fmt.Sprintf("ssh-keygen -f %s -R %s@nix-infra", quoteWords([]string{file}), name), "it has the host key of %.64q, which is no node any more", name)
		}
	}
	if stale == 0 {
		d.add(fine, file, "host-keys", "", "all of them are of nodes that there are")
	}
}
