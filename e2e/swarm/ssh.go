//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"
)

// errNoSSHD says that there is nothing to compare with.
var errNoSSHD = errors.New("there is no sshd here (Debian: apt-get install openssh-server), so SSH is left out")

// concurrencies are how many execs are under way at the same time.
var concurrencies = []int{10, 50}

// daemon is a real sshd on the loopback, with its own keys and configuration.
type daemon struct {
	cmd     *exec.Cmd
	log     bytes.Buffer
	address string
	config  *ssh.ClientConfig
}

// startSSHD starts it. It takes a key pair only: no PAM, no DNS, nothing that would make a login dearer than it must be.
// Nor does a bash, which believes that another one started it (SHLVL), read this machine's start files.
func startSSHD(dir string) (*daemon, error) {
	program, err := findSSHD()
	if err != nil {
		return nil, err
	}
	self, err := user.Current()
	if err != nil {
		return nil, err
	}
	host, _, err := newKey(filepath.Join(dir, "host"))
	if err != nil {
		return nil, err
	}
	client, signer, err := newKey(filepath.Join(dir, "client"))
	if err != nil {
		return nil, err
	}
	authorized := filepath.Join(dir, "authorized")
	if err := os.WriteFile(authorized, ssh.MarshalAuthorizedKey(client), 0o600); err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 {
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // Debian's sshd locks its unprivileged half in there
			return nil, err
		}
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	listen, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "sshd_config")
	if err := os.WriteFile(config, fmt.Appendf(nil, `ListenAddress %s
Port %s
HostKey %s
AuthorizedKeysFile %s
StrictModes no
UsePAM no
UseDNS no
PasswordAuthentication no
PermitRootLogin prohibit-password
SetEnv SHLVL=1
MaxStartups 1000
PidFile none
`, listen, port, filepath.Join(dir, "host"), authorized), 0o600); err != nil {
		return nil, err
	}
	d := &daemon{cmd: exec.Command(program, "-D", "-e", "-f", config), address: address,
		config: &ssh.ClientConfig{User: self.Username, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(host), Timeout: readyWithin}}
	d.cmd.Stderr = &d.log
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	return d, nil
}

func findSSHD() (string, error) {
	for _, name := range []string{"sshd", "/usr/sbin/sshd"} {
		if path, err := exec.LookPath(name); err == nil {
			return filepath.Abs(path) // sshd starts itself again by this path
		}
	}
	return "", errNoSSHD
}

// newKey writes a private key, as sshd reads it.
func newKey(file string) (ssh.PublicKey, ssh.Signer, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	block, err := ssh.MarshalPrivateKey(private, "swarm")
	if err != nil {
		return nil, nil, err
	}
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		return nil, nil, err
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		return nil, nil, err
	}
	return signer.PublicKey(), signer, nil
}

func (d *daemon) close() {
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	_ = d.cmd.Wait()
}

// exec connects, runs true, and closes the connection.
func (d *daemon) exec(ctx context.Context) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", d.address)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	c, channels, requests, err := ssh.NewClientConn(conn, d.address, d.config)
	if err != nil {
		conn.Close()
		return err
	}
	client := ssh.NewClient(c, channels, requests)
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		return err
	}
	defer session.Close()
	return session.Run("true")
}

// ready waits until it can be reached.
func (d *daemon) ready(ctx context.Context) error {
	for deadline := time.Now().Add(readyWithin); ; {
		err := d.exec(ctx)
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) || !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("sshd: %w\n%s", err, d.log.Bytes())
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

// measureSSH prints a table of what so many execs of true cost, each over a connection of its own, and gives the CPU time
// of one, of both sides, at its lowest.
func measureSSH(ctx context.Context, out io.Writer, dir string, execs int) (time.Duration, error) {
	dir = filepath.Join(dir, "ssh")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return 0, err
	}
	d, err := startSSHD(dir)
	if err != nil {
		return 0, err
	}
	defer d.close()
	if err := d.ready(ctx); err != nil {
		return 0, err
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "SSH, true\tEXECS\tTOOK\t1,000 NODES WOULD TAKE\tP50\tCPU AN EXEC\tSSHD\tCLIENT")
	lowest := time.Duration(0)
	for _, concurrency := range concurrencies {
		m, err := d.measure(ctx, execs, concurrency)
		if err != nil {
			return 0, errors.Join(err, table.Flush())
		}
		each := m.server + m.client
		if lowest == 0 || each < lowest {
			lowest = each
		}
		fmt.Fprintf(table, "%d at the same time\t%d\t%.1f s\t%.1f s\t%s\t%s\t%s\t%s\n", concurrency, execs, m.took.Seconds(),
			m.took.Seconds()/float64(execs)*1000, millis(m.median), millis(each), millis(m.server), millis(m.client))
	}
	return lowest, table.Flush()
}

// logins is what execs cost.
type logins struct {
	took, median   time.Duration // of all, of one
	server, client time.Duration // CPU of one
}

// measure runs so many execs, some of them at the same time.
func (d *daemon) measure(ctx context.Context, execs, concurrency int) (*logins, error) {
	server, client, began := cpuWithChildren(d.cmd.Process.Pid), cpu(os.Getpid()), time.Now()
	all, ctx := errgroup.WithContext(ctx)
	all.SetLimit(concurrency)
	each := make([]time.Duration, execs)
	for i := range each {
		all.Go(func() error {
			began := time.Now()
			err := d.exec(ctx)
			each[i] = time.Since(began)
			return err
		})
	}
	if err := all.Wait(); err != nil {
		return nil, fmt.Errorf("sshd: %w\n%s", err, tail(d.log.Bytes()))
	}
	m := &logins{took: time.Since(began), client: (cpu(os.Getpid()) - client) / time.Duration(execs)}
	if err := d.idle(); err != nil {
		return nil, err
	}
	m.server = (cpuWithChildren(d.cmd.Process.Pid) - server) / time.Duration(execs)
	slices.Sort(each)
	m.median = each[execs/2]
	return m, nil
}

// idle waits until all of sshd's sessions have ended: only then is their time part of its own.
func (d *daemon) idle() error {
	children := fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", d.cmd.Process.Pid)
	for deadline := time.Now().Add(readyWithin); ; time.Sleep(10 * time.Millisecond) {
		left, err := os.ReadFile(children)
		if err != nil || len(bytes.TrimSpace(left)) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("sshd: sessions are left: %s", left)
		}
	}
}
