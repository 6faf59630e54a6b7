package heartbeat

import (
	"os"
	"os/exec"
	"testing"
)

// TestOverlayIP makes an interface as flannel does, which takes a network namespace of its own: the test runs itself in one.
func TestOverlayIP(t *testing.T) {
	const inside = "NIX_INFRA_TEST_OVERLAY"
	ip := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %q: %v: %s", args, err, out)
		}
	}
	if os.Getenv(inside) == "" {
		if out, err := exec.Command("unshare", "--net", "ip", "link").CombinedOutput(); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("no ip in a network namespace: %v: %s", err, out)
			}
			t.Skipf("LEFT OUT: no ip in a network namespace: %v: %s", err, out)
		}
		cmd := exec.Command("unshare", "--net", os.Args[0], "-test.run=^TestOverlayIP$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		t.Logf("%s", out)
		return
	}
	if got, err := OverlayIP(); err != nil || got != "" {
		t.Errorf("with no such interface: %q, %v", got, err)
	}
	ip("link", "add", "flannel-wg", "type", "veth", "peer", "name", "other")
	ip("addr", "add", "2001:db8::1/128", "dev", "flannel-wg")
	ip("addr", "add", "10.10.93.0/32", "dev", "flannel-wg")
	if got, err := OverlayIP(); err != nil || got != "10.10.93.0" {
		t.Errorf("%q, %v", got, err)
	}
	if b := (&Host{}).Facts(t.Context()); b.OverlayIP != "10.10.93.0" {
		t.Errorf("a beat says %q", b.OverlayIP)
	}
}
