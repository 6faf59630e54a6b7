package project

import (
	"crypto/rand"
	"strings"
)

// templateVersion is the NixOS version of a project that is made of a template and is given none.
const templateVersion = "25.11"

// ApplyTemplate makes new settings those that the files of a template (package examples) expect.
func (s *Settings) ApplyTemplate(template string) {
	s.Defaults.NixOSVersion = firstOf(s.Defaults.NixOSVersion, templateVersion)
	s.Defaults.CloseSSH = true
	switch template {
	case "fleet":
		s.Defaults.NodeModule = "standalone_machine"
	case "cluster":
		s.Defaults.NodeModule = "cluster_node"
		s.Cluster = Cluster{UUID: strings.ToLower(rand.Text()), ControlNodes: []string{"etcd001"}}
		s.Nodes = map[string]NodeSettings{
			"etcd001": {Tags: []string{"control"}}, "registry001": {Tags: []string{"registry"}}, "service001": {Tags: []string{"service"}},
			"worker001": {Tags: []string{"worker"}}, "ingress001": {Tags: []string{"ingress"}, NodeModule: "ingress_node"},
		}
	}
}
