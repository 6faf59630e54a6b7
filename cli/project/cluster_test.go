package project

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestCluster(t *testing.T) {
	s, err := parseSettings([]byte("fleet: f\ncluster:\n  uuid: d9e2-42\n  control_nodes: [etcd001, etcd002]\n  service_groups:\n    service001: [services, backends]\n"))
	want := Cluster{UUID: "d9e2-42", ControlNodes: []string{"etcd001", "etcd002"}, ServiceGroups: map[string][]string{"service001": {"services", "backends"}}}
	if err != nil || !reflect.DeepEqual(s.Cluster, want) {
		t.Errorf("%+v, %v", s.Cluster, err)
	}
	for text, want := range map[string][]string{
		"fleet: f\ncluster:\n  uuid: \"a b\"\n  control_nodes: [etcd001, No, etcd001]\n": {
			`:3: cluster.uuid: "a b" is no id`, ":4: cluster.control_nodes.1: ", ":4: cluster.control_nodes.2: etcd001 is listed twice"},
		"fleet: f\ncluster:\n  service_groups:\n    Bad: [services]\n    web1:\n    - ok\n    - a b\n": {
			":4: cluster.service_groups.Bad: ", `:7: cluster.service_groups.web1.1: "a b" is no name`},
		"fleet: f\ncluster:\n  nodes: [a]\n":                    {`:3: unknown key "nodes"`},
		"fleet: f\nnodes:\n  a:\n    test_dir: \"__test__\\n\"": {":4: nodes.a.test_dir: "},
	} {
		_, err := parseSettings([]byte(text))
		failsWith(t, err, want...)
	}
}

// Other nodes are never taken for the control nodes of a cluster: all nodes that were told so would lose it.
func TestCheckControlNodes(t *testing.T) {
	s := Settings{Cluster: Cluster{ControlNodes: []string{"etcd001", "etcd002"}}}
	for names, wrong := range map[string]string{
		"etcd001": "", "etcd002 etcd001": "", "service001": "service001: no control node", "etcd001 service001 x\x1b": `service001, "x\x1b": no control node`,
	} {
		err := s.CheckControlNodes(strings.Fields(names))
		if wrong == "" && err != nil || wrong != "" && (err == nil || !strings.HasPrefix(err.Error(), wrong) || !strings.HasSuffix(err.Error(), "are etcd001 etcd002")) {
			t.Errorf("%q: %v", names, err)
		}
	}
	if err := (Settings{}).CheckControlNodes([]string{"etcd001"}); !errors.Is(err, ErrNoCluster) {
		t.Errorf("none recorded: %v", err)
	}
}

// What is recorded counts more than the environment, which an older wrapper may fill with anything.
func TestControlNodes(t *testing.T) {
	p := small(t, map[string]string{".env": "CTRL_NODES='a  b'\nCLUSTER_UUID=env\n"})
	if got := p.ControlNodes(); !reflect.DeepEqual(got, []string{"a", "b"}) || p.ClusterUUID() != "env" {
		t.Errorf("none recorded: %q, %q", got, p.ClusterUUID())
	}
	p.Settings.Cluster = Cluster{UUID: "own", ControlNodes: []string{"c"}}
	if got := p.ControlNodes(); !reflect.DeepEqual(got, []string{"c"}) || p.ClusterUUID() != "own" {
		t.Errorf("recorded: %q, %q", got, p.ClusterUUID())
	}
}

// A node that is under a test has the test's file until something else is said.
func TestRecordedTestFolder(t *testing.T) {
	p := small(t, map[string]string{
		"nodes/n1.nix": "[%%secrets/own%%]", "__test__/a/nodes/n1.nix": "a [%%secrets/a%%]", "__test__/b/nodes/n1.nix": "b",
		SettingsFile: "fleet: f\ncontrollers: []\nnodes: { n1: { test_dir: __test__/a } }\n",
	})
	for dir, want := range map[string]string{"": "a a", "__test__/b": "b"} {
		tree, err := p.Tree(TreeRequest{Node: "n1", TestDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range tree.Files {
			if f.Path == "n1.nix" && string(f.Data) != want {
				t.Errorf("--test-dir %q: %q", dir, f.Data)
			}
		}
		if said := strings.Contains(strings.Join(tree.Warnings, ""), "n1 is under the test of __test__/a"); said != (dir == "") {
			t.Errorf("--test-dir %q: warnings %q", dir, tree.Warnings)
		}
	}
	if uses, err := p.Secrets("n1", ""); err != nil || len(uses) != 1 || uses[0].Name != "a" {
		t.Errorf("secrets %v, %v", uses, err)
	}
}
