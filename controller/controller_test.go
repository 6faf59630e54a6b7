package controller

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestDeployAndShow(t *testing.T) {
	r := startRig(t)
	admin, vera := r.person("anna", protocol.Admin), r.person("vera", protocol.Viewer)
	nodes := r.online(admin, "n1", "n2")
	n1, n2 := nodes[0], nodes[1]
	sub, err := n1.nc.SubscribeSync(protocol.LookSubject("n1"))
	must(t, err)
	must(t, n1.nc.FlushTimeout(patience))

	items := admin.deploy(t, "d1", 5, "n1", "n2")
	m, err := sub.NextMsg(patience)
	must(t, err)
	look := value[protocol.Look](t)(protocol.Decode[protocol.Look](m.Data))
	if look.Serial != 5 || look.Digest != items[0].Digest {
		t.Fatalf("look %+v", look)
	}
	got, err := n1.manifest(t, look.Digest)
	must(t, err)
	if protocol.Digest(got.Manifest) != look.Digest {
		t.Fatal("the manifest is another one")
	}
	if empty, err := n1.manifest(t, ""); err != nil || empty.Digest != look.Digest {
		t.Fatalf("without a digest: %+v, %v", empty.Digest, err)
	}

	admin.released(t, "d1", "n1", "n2")
	n1.beat(t, protocol.Beat{Interval: 120, Serial: 5, Deployment: "d1", Phase: protocol.Building})
	eventually(t, "n1 builds", func() bool {
		d := vera.show(t, "d1")
		return d.Nodes["n1"].Phase == protocol.Building && d.Nodes["n2"].Phase == ""
	})
	report := protocol.Report{Version: 1, Deployment: "d1", Serial: 5, Mode: protocol.Switch, Phase: protocol.RolledBack, Ended: time.Now(), Log: "boom"}
	_, err = n2.ask(protocol.UpReport, report)
	must(t, err)
	d := vera.show(t, "d1")
	if d.Count[protocol.RolledBack] != 1 || d.Count[protocol.Building] != 1 || d.Nodes["n2"].Report.Log != "boom" || d.By != "anna" {
		t.Fatalf("%+v", d)
	}

	admin.deploy(t, "d2", 6, "n1")
	d = vera.show(t, "d1")
	if d.Nodes["n1"].Superseded != "d2" || d.Nodes["n2"].Superseded != "" {
		t.Fatalf("superseded: %+v", d.Nodes)
	}
	list := asked[protocol.DeploymentList](t, vera, protocol.ListDeployments, protocol.Page{Limit: 1})
	if len(list.Deployments) != 1 || list.Deployments[0].ID != "d2" || list.Next != "d2" {
		t.Fatalf("%+v", list)
	}
	admin.released(t, "d2", "n1")
	page := asked[protocol.NodeList](t, vera, protocol.ListNodes, protocol.Page{Limit: 1})
	if len(page.Nodes) != 1 || page.Nodes[0].Name != "n1" || page.Next != "n1" || page.Nodes[0].State() != "pending" {
		t.Fatalf("%+v", page)
	}
	page = asked[protocol.NodeList](t, vera, protocol.ListNodes, protocol.Page{After: page.Next})
	if len(page.Nodes) != 1 || page.Nodes[0].Name != "n2" || page.Next != "" {
		t.Fatalf("%+v", page)
	}
}

func TestStartRefuses(t *testing.T) {
	fails := func(cfg Config, want string) {
		t.Helper()
		c, err := Start(context.Background(), cfg, testLog())
		if err == nil {
			c.Stop()
			t.Fatal("started")
		}
		if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Fatalf("%q does not say %q in one line", err, want)
		}
	}
	fails(DefaultConfig(t.TempDir()), "not enrolled")

	r := startRig(t)
	fails(r.cfg, "another controller is running")
	other := enrolled(t)
	other.cfg.Broker.Listen = strings.TrimPrefix(r.c.ClientURL(), "tls://")
	fails(other.cfg, "can't listen on")

	broken := enrolled(t)
	must(t, os.WriteFile(filepath.Join(broken.cfg.Dir, "etcd"), []byte("no folder"), 0o600))
	fails(broken.cfg, "etcd")
	must(t, os.Remove(filepath.Join(broken.cfg.Dir, "etcd")))
	must(t, os.WriteFile(filepath.Join(broken.cfg.Dir, "nats"), []byte("no folder"), 0o600))
	fails(broken.cfg, "nats")
}

// A folder is free when its controller has stopped, even if a program is just being started: that has all files for a moment.
func TestStopUnlocks(t *testing.T) {
	r := startRig(t)
	child := value[int](t)(syscall.Dup(int(r.c.lock.Fd())))
	defer syscall.Close(child)
	r.restart()
}

func TestConfig(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "c.yaml")
	for content, want := range map[string]string{
		"broker:\n  listn: x\n":         "line 2: field listn not found",
		"broker: [":                     "c.yaml",
		"heartbeat:\n  interval: ten":   "line 2",
		"heartbeat:\n  interval: 0":     "heartbeat.interval",
		"etcd:\n  external:\n    ca: x": "endpoints",
		"broker:\n  listen: ''":         "broker.listen",
	} {
		must(t, os.WriteFile(path, []byte(content), 0o600))
		_, err := LoadConfig(path, dir)
		if err == nil || !strings.Contains(err.Error(), want) || strings.ContainsAny(err.Error(), "\n") || strings.Contains(err.Error(), "type") {
			t.Errorf("%q: %v", content, err)
		}
	}
	if _, err := LoadConfig(filepath.Join(dir, "none.yaml"), dir); err == nil {
		t.Error("a named file that is missing was accepted")
	}
	c, err := LoadConfig("", dir)
	if err != nil || c.Broker.Listen != "0.0.0.0:4222" || c.Broker.Websocket != "0.0.0.0:443" {
		t.Errorf("%+v, %v", c, err)
	}
	must(t, os.WriteFile(path, []byte("broker:\n  websocket: ''\n"), 0o600))
	if c, err = LoadConfig(path, dir); err != nil || c.Broker.Websocket != "" || c.Broker.Listen == "" {
		t.Errorf("%+v, %v", c, err)
	}
}
