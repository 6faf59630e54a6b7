package protocol

import (
	"fmt"
	"slices"

	"github.com/nats-io/jwt/v2"
)

// Role is what a signing key of the fleet's account may hand out. The four roles of people are
// ordered: each may do what the ones before it may.
type Role string

const (
	Node       Role = "node"       // an agent: speaks as itself, orders nothing
	Controller Role = "controller" // a controller: carries orders, gives none
	Viewer     Role = "viewer"     // asks
	Operator   Role = "operator"   // runs whitelisted commands and actions
	Deployer   Role = "deployer"   // deploys, rolls back, reboots
	Admin      Role = "admin"      // everything, and access
	Joiner     Role = "joiner"     // a token: asks to become the node that it names
)

// Roles are all roles that a fleet's account has a signing key for.
var Roles = []Role{Node, Controller, Viewer, Operator, Deployer, Admin, Joiner}

var people = []Role{Viewer, Operator, Deployer, Admin}

// AtLeast tells whether r may do what least is needed for. Nodes, controllers and tokens may order nothing.
func (r Role) AtLeast(least Role) bool {
	i, j := slices.Index(people, r), slices.Index(people, least)
	return i >= 0 && j >= 0 && i >= j
}

// Action names what a request or a manifest asks for.
type Action string

const (
	// Deploy is the action of a manifest, and of the request that hands manifests to the controller.
	Deploy Action = "deploy"

	// Asked of nodes.
	Ping    Action = "ping"    // are you there; answered with a Pong
	Facts   Action = "facts"   // the heartbeat's facts, fresh; answered with a Beat
	Release Action = "release" // let a quarantined closure (NameRequest: its store path, "" for all) be tried again

	ListGenerations Action = "generations" // of the system profile; answered with a GenerationList
	CollectGarbage  Action = "gc"          // GarbageRequest; answered with a GarbageReport
	OwnFiles        Action = "own-files"   // those of NodeFiles that the node has; answered with a FileList

	ListUnits     Action = "units"       // UnitsQuery; answered with a UnitList
	ShowUnit      Action = "unit"        // UnitQuery; answered with a UnitStatus
	ReadJournal   Action = "logs"        // JournalQuery; answered with a JournalPart
	FollowJournal Action = "logs-follow" // JournalQuery; answered with JournalParts, for as long as it is renewed
	ReadStats     Action = "stats"       // StatsQuery; answered with Stats
	ReadFiles     Action = "files"       // FilesQuery; answered with a FileAnswer
	Stream        Action = "stream"      // StreamOrder about a request that is still answered

	RotateSecret Action = "secret-rotate" // RotateOrder; answered with a Rotated
	ListSecrets  Action = "secrets"       // that the node holds, without values; answered with a SecretList

	Rekey Action = "rekey" // RekeyOrder: the node gets other keys; answered with a RekeyReply

	RunCommand Action = "exec"   // CommandOrder; answered with Outputs. The node's policy may want more than a viewer
	RunShell   Action = "shell"  // ShellOrder; answered with Outputs, where the node's policy allows shells
	RunScript  Action = "action" // ScriptOrder: an app module's action; answered with Outputs
	OpenTunnel Action = "tunnel" // TunnelOrder; answered with a TunnelReply. The node's policy may want more than an operator

	// Asked of the controller.
	ListNodes       Action = "nodes"
	ListDeployments Action = "deployments"
	ShowDeployment  Action = "deployment"
	MissingBlobs    Action = "blobs-missing"
	PutBlobs        Action = "blobs-put"
	PutNode         Action = "node-put"
	RemoveNode      Action = "node-remove"
	TagNode         Action = "node-tag"
	LockNode        Action = "node-lock"     // LockRequest; answered with the NodeRecord
	SteerRollout    Action = "rollout"       // RolloutOrder; answered with the Deployment
	ShowManifest    Action = "manifest-show" // ManifestRequest; answered with a ManifestReply
	ShowBlob        Action = "blob-show"     // BlobRequest; answered with a BlobReply
	PutAccount      Action = "account-put"   // AccountUpdate; answered with an AccountReply
	ShowAudit       Action = "audit"         // AuditQuery; answered with an AuditPage
	ShowHealth      Action = "health"        // answered with a ControllerHealth
	ListJoinings    Action = "joinings"      // Page, whose names are nodes' and whose After is a Next; answered with a JoiningList
	AnswerJoining   Action = "join-answer"   // JoinAnswer

	// Join is what a machine with a token does. Nobody orders it; the record has it.
	Join Action = "join"
)

// leastRole is the one table of who may do what. An action without a row needs Admin.
var leastRole = map[Action]Role{
	Deploy:          Deployer,
	Ping:            Viewer,
	Facts:           Viewer,
	Release:         Deployer,
	ListNodes:       Viewer,
	ListDeployments: Viewer,
	ShowDeployment:  Viewer,
	MissingBlobs:    Deployer,
	PutBlobs:        Deployer,
	PutNode:         Admin,
	RemoveNode:      Admin,
	TagNode:         Deployer,
	ListGenerations: Viewer,
	CollectGarbage:  Deployer,
	OwnFiles:        Deployer,
	ListUnits:       Viewer,
	ShowUnit:        Viewer,
	ReadJournal:     Viewer,
	FollowJournal:   Viewer,
	ReadStats:       Viewer,
	ReadFiles:       Viewer,
	Stream:          Viewer,
	RunCommand:      Viewer,
	RunShell:        Admin,
	RunScript:       Operator,
	OpenTunnel:      Operator,
	RotateSecret:    Deployer,
	ListSecrets:     Viewer,
	Rekey:           Admin,
	LockNode:        Deployer,
	SteerRollout:    Deployer,
	ShowManifest:    Viewer,
	ShowBlob:        Viewer,
	ShowHealth:      Viewer,
	PutAccount:      Admin,
	ListJoinings:    Admin,
	AnswerJoining:   Admin,
	// The record tells what everybody did and was refused, admins too. No work needs that: it is for those who answer
	// for access, and a credentials file in a program's hands (a viewer's, most often) should not bring it along.
	ShowAudit: Admin,
}

// LeastRole is the role that an action needs.
func LeastRole(a Action) Role {
	if r, ok := leastRole[a]; ok {
		return r
	}
	return Admin
}

// OnlyAsks tells whether an action changes nothing, whatever comes of it: a viewer may do it, and nothing is run for it.
func OnlyAsks(a Action) bool { return LeastRole(a) == Viewer && a != RunCommand }

// Permissions are what the broker lets a role publish and subscribe; {{name()}} is the user's name, {{subject()}} its key.
// nats-server expands the templates of scoped signing keys itself (its docs: securing_nats/jwt).
func Permissions(r Role) (jwt.Permissions, error) {
	const name, key = "{{name()}}", "{{subject()}}"
	var pub, sub []string
	switch r {
	case Node:
		pub = []string{"ni.*.reply.*.*." + name, "ni.*.node." + name + ".up.*", "ni.*.node." + name + ".event.*"}
		sub = []string{"ni.*.node." + name + ".req.*", "ni.*.all.req.*", "ni.*.node." + name + ".down.>", "ni.*.node." + name + ".tunnel.*.*"}
	case Controller:
		pub = []string{"ni.*.reply.*.*." + ControllerName, "ni.*.node.*.down.>", "ni.*.controller." + name + ".audit",
			"$JS.API.>", "$JS.ACK.>", "$O.>"}
		sub = []string{"ni.*.ctl.req.*", "ni.*.node.*.up.*", "ni.*.controller." + name + ".inbox.>"}
	case Joiner:
		// Both are within what a controller of an older account JWT may hear and say.
		pub = []string{"ni.*.node." + name + ".up." + UpJoin}
		sub = []string{"ni.*.node." + name + ".down." + UpJoin + "." + key + ".>"}
	case Viewer, Operator, Deployer, Admin:
		for _, tier := range people[:slices.Index(people, r)+1] {
			for _, to := range []string{"node.*", "all", "ctl"} {
				pub = append(pub, "ni.*."+to+".req."+string(tier))
			}
		}
		if r.AtLeast(LeastRole(OpenTunnel)) {
			pub = append(pub, "ni.*.node.*.tunnel."+name+".*")
		}
		sub = []string{"ni.*.reply." + name + ".>", "ni.*.node.*.event.*"}
	default:
		return jwt.Permissions{}, fmt.Errorf("there is no role %q; the roles are %v", r, Roles)
	}
	return jwt.Permissions{Pub: jwt.Permission{Allow: pub}, Sub: jwt.Permission{Allow: sub}}, nil
}

// limits are what the broker keeps and carries for a connection of those whom one machine's theft would make hostile: an
// agent has half a dozen subscriptions, a token's machine two.
func limits(r Role) jwt.NatsLimits {
	l := jwt.NatsLimits{Subs: jwt.NoLimit, Data: jwt.NoLimit, Payload: jwt.NoLimit}
	switch r {
	case Node:
		l.Subs = 64
	case Joiner:
		l.Subs, l.Payload = 8, 2*MaxJoinRequest
	}
	return l
}
