//go:build linux

package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/e2e/lab"
	"github.com/nix-infra/nix-infra/protocol"
)

// The secrets of these tests: the value of one is loaded by teller.service, that of the other by other.service.
const (
	dbPassword = "db.password"
	otherToken = "other.token"
)

// teller is a node's configuration with a service for each secret. It leaves the digest of what it loaded in /run, and does
// not start where that begins with "bad".
func teller(message, more string) string {
	unit := func(name, secret string) string {
		return fmt.Sprintf(`units."%[1]s.service" = {
    unit.Description = "loads a secret";
    service = {
      Type = "exec";
      LoadCredentialEncrypted = "%[2]s:/root/secrets/[%%%%secrets/%[2]s%%%%]";
      ExecStartPre = testos.writeScript "%[1]s-check" ''
        umask 077
        sha256sum <"$CREDENTIALS_DIRECTORY/%[2]s" | cut -c1-64 >/run/%[1]s.digest
        read -r word <"$CREDENTIALS_DIRECTORY/%[2]s" || true
        case $word in bad*) exit 1 ;; esac
      '';
      ExecStart = testos.writeScript "%[1]s" "exec sleep infinity";
    };
  };
  `, name, secret)
	}
	return fmt.Sprintf(`{ testos, ... }: {
  infrastructure.hello = { enable = true; message = %q; };
  %s%s%s
}
`, message, unit("teller", dbPassword), unit("other", otherToken), more)
}

// feed runs the CLI with something on its standard input, and wants it to exit with a code.
func (f *fleet) feed(code int, input string, args ...string) result {
	f.t.Helper()
	cmd := f.command(args...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		f.t.Fatal(err)
	}
	r := result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
	if r.code != code {
		f.t.Fatalf("nix-infra %s: want exit %d, got %v", strings.Join(args, " "), code, r)
	}
	return r
}

// secretive is the shared fleet whose n1 has the services and the secrets, all of it for this test only.
func secretive(t *testing.T, value, more string) (*fleet, *lab.Node) {
	t.Helper()
	f := shared(t)
	t.Cleanup(func() {
		os.RemoveAll(filepath.Join(f.project, "secrets"))
		os.Remove(filepath.Join(f.project, "nodes/n1.nix"))
	})
	f.feed(0, value, "secrets", "store", dbPassword)
	f.feed(0, "the other one's", "secrets", "store", otherToken)
	f.write("nodes/n1.nix", teller("with secrets", more))
	f.deploySecrets()
	f.loaded("teller", value)
	return f, f.nodes["n1"]
}

func (f *fleet) deploySecrets(more ...string) {
	f.t.Helper()
	f.must(append([]string{"deploy", "n1", "--timeout", "60s", "--settle", "1s", "--batch"}, more...)...)
}

func (f *fleet) digest(unit string) string {
	f.t.Helper()
	out, err := f.nodes["n1"].Exec(f.ctx, "cat", "/run/"+unit+".digest")
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(out))
}

// loaded waits until a service has loaded a value.
func (f *fleet) loaded(unit, value string) {
	f.t.Helper()
	want := fmt.Sprintf("%x", sha256.Sum256([]byte(value)))
	f.eventually(soon, func() string {
		if got := f.digest(unit); got != want {
			return fmt.Sprintf("%s has not loaded %q (digest %s)", unit, value, got)
		}
		return ""
	})
}

// runs names the run of a service: another one after each start.
func (f *fleet) runs(unit string) string {
	f.t.Helper()
	return f.property(f.nodes["n1"], unit+".service", "InvocationID")
}

// TestSecrets: a service has the value that the operator stored: after a deploy, a boot, a rotation, a rollback, and each
// way back from what was not proven.
func TestSecrets(t *testing.T) {
	f := shared(t)
	site := f.guardedSite()
	f.feed(0, site.netrc(), "secrets", "store", "site.netrc")
	more := fmt.Sprintf(`etc."fetched".text = builtins.readFile (builtins.fetchurl { url = %q; sha256 = "%x"; });
  # [%%%%pre-build-secrets/site.netrc%%%%]`, site.url, sha256.Sum256([]byte(siteContent)))
	f, node := secretive(t, "one", more)

	if got := f.exec(node, "stat", "-L", "-c", "%a", "/root/secrets", "/root/secrets/"+dbPassword, "/run/keys", "/run/keys/site.netrc"); got != "700\n400\n700\n400" {
		t.Errorf("modes: %q", got)
	}
	if got := f.exec(node, "systemd-creds", "decrypt", "--name="+dbPassword, "/root/secrets/"+dbPassword, "-"); got != "one" {
		t.Errorf("at rest is %q", got)
	}

	if err := node.Reboot(f.ctx); err != nil {
		t.Fatal(err)
	}
	f.loaded("teller", "one")
	f.answers("n1")
	f.eventually(soon, func() string {
		if _, err := node.Exec(f.ctx, "test", "-s", "/run/keys/site.netrc"); err != nil {
			return "what builds need was not brought again"
		}
		return ""
	})

	one, teller1, other := f.running(node), f.runs("teller"), f.runs("other")
	r := f.feed(0, "two", "secrets", "rotate", dbPassword, "--settle", "1s", "--batch")
	f.loaded("teller", "two")
	if f.runs("teller") == teller1 || f.runs("other") != other || !strings.Contains(r.out+r.errOut, "teller.service") || strings.Contains(r.out+r.errOut, "other.service") {
		t.Errorf("a rotation restarts what loads the secret, and nothing else: %v", r)
	}
	teller2 := f.runs("teller")
	f.deploySecrets()
	if f.runs("teller") != teller2 || f.running(node) != one {
		t.Error("a deploy of what a rotation brought is no change, and something was restarted")
	}

	// A secret that changes alone is put in place and proven as a system is.
	f.feed(0, "three", "secrets", "store", dbPassword)
	if r := f.must("deploy", "n1", "--mode", "dry-activate", "--batch"); !strings.Contains(r.out, "change the secrets "+dbPassword+"\n") || !strings.Contains(r.out, "restart teller.service\n") || f.runs("teller") != teller2 {
		t.Errorf("a dry run: %v", r)
	}
	f.deploySecrets()
	f.loaded("teller", "three")
	if f.running(node) != one || f.runs("other") != other {
		t.Error("a secret changed, and something else did, too")
	}
	f.write("nodes/n1.nix", teller("another system", ""))
	f.feed(0, "four", "secrets", "store", dbPassword)
	f.deploySecrets()
	f.loaded("teller", "four")
	back := func(value string) {
		t.Helper()
		f.must("rollback", "n1", "--timeout", "60s", "--settle", "1s", "--batch")
		f.loaded("teller", value)
		if f.running(node) != one {
			t.Error("a rollback went elsewhere")
		}
	}
	back("three")
	back("two")

	// Nobody proves it: the timer goes back without an agent, and a boot without anything.
	f.write("nodes/n1.nix", teller("with secrets", more))
	f.feed(0, "unproven", "secrets", "store", dbPassword)
	f.must("deploy", "n1", "--timeout", "14s", "--settle", "12s", "--batch", "--detach")
	f.loaded("teller", "unproven")
	f.exec(node, "systemctl", "kill", "-s", "KILL", "nix-infra-agent.service")
	f.exec(node, "systemctl", "stop", "nix-infra-agent.service")
	f.loaded("teller", "two")
	f.exec(node, "systemctl", "start", "nix-infra-agent.service")
	f.waitState("n1", soon, "rolled back", func(s status) bool { return s.Online && s.State == "rolled-back" })
	f.loaded("teller", "two")

	f.must("deploy", "n1", "--timeout", "60s", "--settle", "50s", "--batch", "--detach")
	f.loaded("teller", "unproven")
	f.powerCut(node)
	if got := f.digest("teller"); got != fmt.Sprintf("%x", sha256.Sum256([]byte("two"))) {
		t.Errorf("booted with another secret than the system was proven with: %s", got)
	}
	f.waitState("n1", soon, "rolled back", func(s status) bool { return s.Online && s.State == "rolled-back" })
	f.loaded("teller", "two")
}

func (f *fleet) powerCut(node *lab.Node) {
	f.t.Helper()
	if err := node.Kill(f.ctx); err != nil {
		f.t.Fatal(err)
	}
	if err := node.Boot(f.ctx); err != nil {
		f.t.Fatal(err)
	}
}

// TestRotationFailureRestores: a value with which a service does not start is taken back, on the node and in the project;
// so is one that nobody has proven when the power goes.
func TestRotationFailureRestores(t *testing.T) {
	f, node := secretive(t, "good", "")
	other := f.runs("other")
	r := f.feed(1, "bad one", "secrets", "rotate", dbPassword, "--settle", "1s", "--batch")
	if !strings.Contains(r.out+r.errOut, "teller.service") || !strings.Contains(r.out+r.errOut, "the old value is back") {
		t.Errorf("it does not say what failed: %v", r)
	}
	f.loaded("teller", "good")
	if state := f.property(node, "teller.service", "ActiveState"); state != "active" || f.runs("other") != other {
		t.Errorf("teller.service is %s; was the other one restarted?", state)
	}
	if got := f.must("secrets", "show", dbPassword).out; strings.TrimSpace(got) != "good" {
		t.Errorf("the project has %q", got)
	}

	cmd := f.command("secrets", "rotate", dbPassword, "--timeout", "60s", "--settle", "50s", "--batch", "--undo")
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Errorf("there is nothing to undo: %s", out)
	}
	cmd = f.command("secrets", "rotate", dbPassword, "--timeout", "60s", "--settle", "50s", "--batch")
	cmd.Stdin = strings.NewReader("unproven")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.loaded("teller", "unproven")
	f.powerCut(node)
	f.loaded("teller", "good")
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
}

// TestRekey: a node with other keys has its secrets, gets new ones, and is nobody any more with the old ones.
func TestRekey(t *testing.T) {
	f, node := secretive(t, "one", "")
	old := f.identity(node)
	if !f.comesIn(old) {
		t.Fatal("the node's keys are not what was read")
	}
	teller := f.runs("teller")
	f.must("node", "rekey", "n1")
	if f.comesIn(old) {
		t.Error("with its old keys somebody comes in")
	}
	if !f.comesIn(f.identity(node)) {
		t.Error("with its new keys nobody comes in")
	}
	if left := f.exec(node, "find", agentDir, "-name", "*.new"); left != "" {
		t.Errorf("it left %s", left)
	}
	f.waitState("n1", soon, "back", func(s status) bool { return s.Online })
	if f.runs("teller") != teller {
		t.Error("a service was restarted for it")
	}
	f.exec(node, "systemctl", "restart", "teller.service")
	f.loaded("teller", "one")
	teller, other := f.runs("teller"), f.runs("other")
	f.deploySecrets()
	if f.runs("teller") != teller {
		t.Error("the same secrets, sealed to another key, are taken for others")
	}
	f.feed(0, "two", "secrets", "store", dbPassword)
	f.deploySecrets()
	f.loaded("teller", "two")
	if f.runs("other") != other {
		t.Error("a secret that did not change was loaded again")
	}
}

// identity is the node's, as somebody has it who copied its disk.
func (f *fleet) identity(node *lab.Node) *protocol.Signer {
	f.t.Helper()
	key, err := nkeys.FromSeed([]byte(f.exec(node, "cat", agentDir+"/user.nk")))
	if err != nil {
		f.t.Fatal(err)
	}
	answer, err := protocol.Decode[protocol.EnrolAnswer]([]byte(f.exec(node, "cat", agentDir+"/enrolment.json")))
	if err != nil {
		f.t.Fatal(err)
	}
	return &protocol.Signer{User: answer.User, Key: key}
}

// TestMissingSecret: what a node's file names has to be there, before anything is done; or it is left out, with a warning.
func TestMissingSecret(t *testing.T) {
	f, node := secretive(t, "good", "")
	was := f.status()["n1"].Serial
	f.write("nodes/n1.nix", teller("more", "# [%%secrets/not.there%%]"))
	r := f.cli("deploy", "n1", "--timeout", "60s", "--settle", "1s", "--batch")
	if r.code != 2 || !strings.Contains(r.errOut, "not.there") || f.status()["n1"].Serial != was {
		t.Errorf("a secret that isn't there: %v", r)
	}
	r = f.must("deploy", "n1", "--timeout", "60s", "--settle", "1s", "--batch", "--allow-missing")
	if !strings.Contains(r.errOut, "secret not found, skipping: not.there") {
		t.Errorf("no warning: %v", r)
	}
	if _, err := node.Exec(f.ctx, "test", "-e", "/root/secrets/not.there"); err == nil {
		t.Error("what was left out is there")
	}
	f.loaded("teller", "good")
}

// TestNoPlaintext: marked values go through store, deploy, rotation and rollback, and are in clear nowhere but where a
// service and a build read them.
func TestNoPlaintext(t *testing.T) {
	marked := func() string { return "Marked:" + protocol.NewID() + protocol.NewID() + ":end" }
	first, second, build := marked(), marked(), marked()
	f := shared(t)
	tap := f.wiretap()
	sample := startSampling(first, second, build)
	defer sample.stop()

	f.feed(0, build, "secrets", "store", "build.key")
	f, node := secretive(t, first, "# [%%pre-build-secrets/build.key%%]")
	f.feed(0, second, "secrets", "rotate", dbPassword, "--settle", "1s", "--batch")
	f.loaded("teller", second)
	f.write("nodes/n1.nix", teller("another system", "# [%%pre-build-secrets/build.key%%]"))
	f.deploySecrets()
	f.must("rollback", "n1", "--timeout", "60s", "--settle", "1s", "--batch")
	f.loaded("teller", second)
	if found := sample.stop(); len(found) > 0 {
		t.Errorf("in the arguments or the environment of processes: %q", found)
	}
	if sample.read < 1000 {
		t.Errorf("only %d arguments and environments were looked at", sample.read)
	}

	values := sample.values
	for _, n := range []*lab.Node{node, f.nodes["n2"], f.ctl} {
		var want string // where they have to be, which also shows that the search finds them
		if n == node {
			want = "/run/credentials/teller.service/" + dbPassword + "\n/run/keys/build.key\n"
		}
		if found := f.grep(n, values); found != want {
			t.Errorf("on %s in clear: %q, want %q", n.Name, found, want)
		}
		log, err := n.Exec(f.ctx, "journalctl", "-o", "export", "--no-pager")
		if err != nil || len(log) < 10_000 || values.in(log) {
			t.Errorf("in the journal of %s, or that can't be read (%d bytes, %v)", n.Name, len(log), err)
		}
	}
	for _, value := range values {
		if n := tap.carrying(string(value)); n > 0 {
			t.Errorf("the broker carried a value %d times", n)
		}
	}
	if tap.carrying(f.status()["n1"].Deployment) == 0 {
		t.Error("nothing of the deployment was heard, so that nothing is shown")
	}
	files := 0
	err := filepath.WalkDir(f.project, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		files++
		data, err := os.ReadFile(path)
		if values.in(data) {
			t.Errorf("in the project, in %s", path)
		}
		return err
	})
	if err != nil || files < 10 {
		t.Errorf("%d files of the project, %v", files, err)
	}
}

// marks are what is searched for: values as they are and in base64, wherever they begin.
type marks [][]byte

func marksOf(values ...string) (m marks) {
	for _, value := range values {
		m = append(m, []byte(value))
		for shift := range 3 {
			m = append(m, []byte(base64.RawStdEncoding.EncodeToString([]byte(value[shift:shift+len(value)/3*3-3]))))
		}
	}
	return m
}

func (m marks) in(data []byte) bool {
	return slices.ContainsFunc(m, func(mark []byte) bool { return bytes.Contains(data, mark) })
}

// grep names the files of a machine in which a value is, one a line, sorted.
func (f *fleet) grep(n *lab.Node, values marks) string {
	f.t.Helper()
	cmd := n.Command(f.ctx, "grep", "-rlasF", "-f", "/dev/stdin",
		"/etc", "/home", "/nix", "/opt", "/root", "/run", "/srv", "/tmp", "/usr/local", "/var")
	cmd.Stdin = bytes.NewReader(bytes.Join(values, []byte("\n")))
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() > 2) { // 1: none; 2: sockets can't be read
		f.t.Errorf("grep on %s: %v", n.Name, err)
	}
	return strings.Join(slices.Sorted(strings.Lines(string(out))), "")
}

// sampler reads the arguments and the environment of every process of this machine, and so of all that are in the lab,
// while it is young: again and again until stop.
type sampler struct {
	values marks
	end    chan struct{}
	ended  sync.WaitGroup
	once   sync.Once
	found  []string
	read   int
}

func startSampling(values ...string) *sampler {
	s := &sampler{values: marksOf(values...), end: make(chan struct{})}
	s.ended.Go(func() {
		seen := map[int]int{}
		for {
			select {
			case <-s.end:
				return
			case <-time.After(5 * time.Millisecond):
				s.look(seen)
			}
		}
	})
	return s
}

// looks is how often a process is looked at: it is another program after it was forked, and not any more a while later.
const looks = 200

func (s *sampler) look(seen map[int]int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if seen[pid]++; seen[pid] > looks && seen[pid]%looks != 0 {
			continue
		}
		for _, name := range []string{"cmdline", "environ"} {
			data, err := os.ReadFile(filepath.Join("/proc", entry.Name(), name))
			if err != nil {
				continue
			}
			s.read++
			if s.values.in(data) {
				s.found = append(s.found, fmt.Sprintf("%s of process %d: %.200q", name, pid, data))
			}
		}
	}
}

func (s *sampler) stop() []string {
	s.once.Do(func() { close(s.end) })
	s.ended.Wait()
	return s.found
}

// site is a web site on the operator's side that wants a password.
type site struct {
	host, url, password string
}

const siteContent = "only for those who log in\n"

func (s site) netrc() string {
	return fmt.Sprintf("machine %s login u password %s\n", s.host, s.password)
}

func (f *fleet) guardedSite() site {
	f.t.Helper()
	s := site{host: f.lab.HostIP(), password: protocol.NewID()}
	listener, err := f.lab.Listen(f.ctx, "tcp", s.host+":0")
	if err != nil {
		f.t.Fatal(err)
	}
	s.url = fmt.Sprintf("http://%s/content", listener.Addr())
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, password, ok := r.BasicAuth(); !ok || password != s.password {
			w.Header().Set("WWW-Authenticate", "Basic")
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = w.Write([]byte(siteContent))
	})}
	go server.Serve(listener)
	f.t.Cleanup(func() { server.Close() })
	return s
}
