package project

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// Cluster is what the nodes of a cluster have in common. A fleet has none.
type Cluster struct {
	UUID          string              `yaml:"uuid,omitempty"`               // tells this etcd cluster from others
	ControlNodes  []string            `yaml:"control_nodes,omitempty,flow"` // the members of etcd, in order
	ServiceGroups map[string][]string `yaml:"service_groups,omitempty"`     // by node, such as services, backends and frontends
}

var (
	uuidForm  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	groupForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$`)
)

// mistakes calls wrong for each mistake that the settings of a cluster have.
func (c Cluster) mistakes(wrong func(err error, words ...string)) {
	if c.UUID != "" && !uuidForm.MatchString(c.UUID) {
		wrong(fmt.Errorf("%q is no id of a cluster; expected letters, digits, dots and dashes, 64 at most, such as a UUID", c.UUID), "uuid")
	}
	for i, name := range c.ControlNodes {
		wrong(ValidNodeName(name), "control_nodes", fmt.Sprint(i))
		if slices.Contains(c.ControlNodes[:i], name) {
			wrong(fmt.Errorf("%s is listed twice", name), "control_nodes", fmt.Sprint(i))
		}
	}
	for _, node := range slices.Sorted(maps.Keys(c.ServiceGroups)) {
		wrong(ValidNodeName(node), "service_groups", node)
		for i, group := range c.ServiceGroups[node] {
			if !groupForm.MatchString(group) {
				wrong(fmt.Errorf("%q is no name of a service group; expected such as services", group), "service_groups", node, fmt.Sprint(i))
			}
		}
	}
}

// ErrNoCluster says that nothing is recorded of a cluster.
var ErrNoCluster = errors.New("no control nodes are recorded in " + SettingsFile)

// CheckControlNodes refuses names that are not control nodes of the recorded cluster: whoever takes other nodes for them
// cuts every node off that is told so. It is ErrNoCluster where none are recorded.
func (s Settings) CheckControlNodes(names []string) error {
	if len(s.Cluster.ControlNodes) == 0 {
		return ErrNoCluster
	}
	var others []string
	for _, name := range names {
		if !slices.Contains(s.Cluster.ControlNodes, name) {
			others = append(others, show(name))
		}
	}
	if len(others) == 0 {
		return nil
	}
	return fmt.Errorf("%s: no control node of this cluster; those in %s (cluster.control_nodes) are %s",
		strings.Join(others, ", "), SettingsFile, strings.Join(s.Cluster.ControlNodes, " "))
}

// ControlNodes are the recorded control nodes or, where there are none, those of $CTRL_NODES.
func (p *Project) ControlNodes() []string {
	if recorded := p.Settings.Cluster.ControlNodes; len(recorded) > 0 {
		return recorded
	}
	return strings.Fields(p.Env.Get("CTRL_NODES"))
}

// ClusterUUID is the recorded id of the cluster or, where there is none, $CLUSTER_UUID.
func (p *Project) ClusterUUID() string {
	return firstOf(p.Settings.Cluster.UUID, p.Env.Get("CLUSTER_UUID"))
}
