package command

import (
	"os"
	"strings"
	"testing"
)

func TestProjectLock(t *testing.T) {
	s := newProject(t)
	private := map[string]string{".env": "TOKEN=0123456789\n", "bob.creds": "credentials of bob", "ca/private/ca.key.pem": "a key of the CA", "ca/intermediate/private/web1-client-tls.key.pem": "a key of a node",
		"ca/intermediate/web1.key.pem": "another key", "ssh/nixinfra": s.read("ssh/nixinfra"), "nix-infra/mcp.creds": s.read("nix-infra/mcp.creds")}
	public := map[string]string{"ca/certs/ca.cert.pem": "c", "ssh/config": "x", "ssh/known_hosts": "x", "ssh/nixinfra.pub": s.read("ssh/nixinfra.pub"), "nodes/web1.nix": "{}", "x/.env": "x"}
	for _, files := range []map[string]string{private, public} {
		for path, content := range files {
			s.write(path, content)
		}
	}
	out := s.must("lock", "--dry-run")
	for path := range private {
		if !strings.Contains(out, "private "+path+"\n") {
			t.Errorf("%s is not private:\n%s", path, out)
		}
	}
	if strings.Count(out, "\n") != len(private) {
		t.Errorf("too many:\n%s", out)
	}
	s.must("lock")
	for path, content := range private {
		if _, err := os.Stat(s.path(path)); !os.IsNotExist(err) {
			t.Errorf("%s: %v", path, err)
		}
		if strings.Contains(s.read(path+".age"), content) {
			t.Errorf("%s is in clear", path)
		}
	}
	for path, content := range public {
		if s.read(path) != content {
			t.Errorf("%s changed", path)
		}
	}
	for _, args := range [][]string{{"status"}, {"init"}, {"secrets", "list"}, {"deploy", "all"}} {
		s.expect(Refused, "is locked; open it with nix-infra unlock", args...)
	}
	s.must("lock") // again is no harm
	s.env["SECRETS_PASS"] = "wrong"
	s.expect(Refused, "wrong password", "unlock")
	s.env["SECRETS_PASS"] = "correct horse"
	s.must("unlock", "--env=.env")
	for path, content := range private {
		if got := s.read(path); got != content {
			t.Errorf("%s is %q", path, got)
		}
	}
	s.must("init")
	if out := s.must("unlock"); !strings.Contains(out, "nothing is locked") {
		t.Error(out)
	}
	s.expect(Refused, "use nix-infra node lock web1", "lock", "web1")
	s.expect(Refused, "use nix-infra node unlock web1", "unlock", "web1")
}

// TestProjectLockKeepsTheWayIn: the key that opens the project can't be locked with it.
func TestProjectLockKeepsTheWayIn(t *testing.T) {
	s := newProject(t)
	s.write("nix-infra/recipients", s.read("ssh/nixinfra.pub"))
	s.must("secrets", "rekey", "--batch")
	s.env["SECRETS_PASS"] = ""
	s.env["NIX_INFRA_IDENTITY"] = s.path("ssh/nixinfra")
	s.expect(Refused, "is the key that opens the project", "lock")
	if s.read("ssh/nixinfra") == "" {
		t.Error("it is gone")
	}
	elsewhere := t.TempDir() + "/mine"
	if err := os.WriteFile(elsewhere, []byte(s.read("ssh/nixinfra")), 0o600); err != nil {
		t.Fatal(err)
	}
	s.env["NIX_INFRA_IDENTITY"] = elsewhere
	s.must("lock")
	s.must("unlock")
}

// TestProjectLockTakesThePasswordAlong: the password must be known before the only file that has it is locked with it.
func TestProjectLockTakesThePasswordAlong(t *testing.T) {
	s := newProject(t)
	s.write(".env", "SECRETS_PASS='correct horse'\n")
	s.env["SECRETS_PASS"] = ""
	s.expect(Refused, "set SECRETS_PASS in the environment, too", "lock", "--batch")
	s.expect(Refused, "no password", "lock")
	if s.read(".env") == "" {
		t.Error("it was locked")
	}
	s.env["SECRETS_PASS"] = "correct horse"
	s.must("lock", "--batch")
	s.must("unlock", "--batch")
	s.write("secrets/older", "b2xkZXI=")
	s.expect(Refused, "secrets migrate", "lock")
}
