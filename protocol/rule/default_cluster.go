package rule

import (
	"slices"

	"github.com/nix-infra/nix-infra/protocol"
)

// nixRules tell what the system is made of, and fetch what a configuration needs the hash of.
func nixRules() []Rule {
	const storePath = `/nix/store/[0-9a-z]{32}-[A-Za-z0-9+._?=-]+(/[A-Za-z0-9+._?=-]+)*|/run/(current|booted)-system|/nix/var/nix/profiles/system(-[0-9]+-link)?`
	nixEnv := []Variable{{Name: "HOME", Value: "/tmp"}} // Nix wants a folder for its caches
	query := viewer("nix-store", flags("-q --query", "-R --requisites", "--references", "--referrers", "--referrers-closure", "-d --deriver", "--size", "--hash", "--tree", "--roots",
		"-u --use-output", "--outputs"), operands(1, 16, "a store path", storePath, notDots))
	query.Defaults, query.Env = []string{"-q"}, nixEnv // no other operation is an option
	query.Denied = []Denied{denied("it builds, changes or copies the store", "-r --realise --serve --gc --delete --add --add-fixed --import --export --restore --dump "+
		"--load-db --dump-db --verify --repair-path --optimise --generate-binary-cache-key --add-root --option --store"),
		denied("it can hand out secrets of a build", "-l --read-log --print-env -b --binding")}
	// It locks the profile, which only root can.
	generations := viewer("nix-env", slices.Concat(flags("--list-generations"), value("/nix/var/nix/profiles/[a-z][a-z0-9-]*", "-p --profile")))
	generations.Defaults, generations.User = []string{"--list-generations"}, "root"
	generations.Denied = []Denied{denied("it changes a profile; a deployment does that", "-i --install -u --upgrade -e --uninstall --set --set-flag --rollback -S --switch-profile "+
		"-G --switch-generation --delete-generations")}
	return []Rule{
		viewer("nixos-version", flags("--json", "--hash --revision", "--configuration-revision")),
		query,
		generations,
		{
			// What only the node reaches, such as its cloud's metadata, is not for everybody: a name can lead there, and a
			// redirection. A deployer could have a build fetch it.
			Name: "nix-prefetch-url", Program: "nix-prefetch-url", Role: protocol.Deployer, Timeout: 600, Env: nixEnv,
			Forms: []Form{{Operands: []Operand{
				operands(1, 1, "an https:// URL of a host that has a name", `https://([A-Za-z0-9][A-Za-z0-9-]*\.)+[A-Za-z][A-Za-z0-9-]*(:443)?/[A-Za-z0-9._~:/?#@!&()*+,;=%-]*`,
					`.*localhost.*|.*localdomain.*|.*/\.\.(/.*)?`),
				operands(0, 1, "a hash", "[A-Za-z0-9+/=:-]{32,200}", ""),
			}}},
			Options: slices.Concat(flags("--unpack", "--print-path"), value("sha256|sha512", "--type"), value("[A-Za-z0-9][A-Za-z0-9+._-]{0,100}", "--name")),
			Denied:  []Denied{denied("it evaluates what it is given", "-A --attr -E --expr -I --option --arg --argstr"), denied("it runs what it has built", "--executable")},
		},
	}
}

// clusterRules are about etcd and the containers. The keys that etcdctl may touch are those of the cluster's model;
// the controller's are beside them, and out of reach.
func clusterRules() []Rule {
	key := operands(1, 1, "a key below /cluster or /coreos.com", `/(cluster|coreos\.com)(/[A-Za-z0-9._:@%+-]*)*`, "")
	etcd := func(name string, role protocol.Role, forms ...Form) Rule {
		return Rule{
			Name: name, Program: "etcdctl", Role: role, User: "root", Forms: forms,
			Options: slices.Concat(value("simple|json|fields|table", "-w --write-out"), value("[1-9][0-9]?(s|ms)", "--dial-timeout", "--command-timeout"), flags("--hex")),
			Env: []Variable{
				{Name: "ETCDCTL_API", Value: "3"},
				{Name: "ETCDCTL_DIAL_TIMEOUT", Value: "3s"},
				{Name: "ETCDCTL_CACERT", Value: "/root/certs/ca-chain.cert.pem", IfExists: true},
				{Name: "ETCDCTL_CERT", Value: "/root/certs/{node}-client-tls.cert.pem", IfExists: true},
				{Name: "ETCDCTL_KEY", Value: "/root/certs/{node}-client-tls.key.pem", IfExists: true},
			},
			Denied: []Denied{
				denied("it reaches beyond the keys of the cluster", "--from-key --range"),
				denied("it runs other programs", "--exec"), denied("it reads commands from a terminal", "-i --interactive"),
				denied("the node asks its own etcd, with its own certificate (endpoint has --cluster for all members)", "--endpoints --cacert --cert --key --user --password "+
					"--insecure-transport --insecure-skip-tls-verify --discovery-srv --discovery-srv-name"),
				denied("it loads the cluster", "check"),
				denied("it changes the cluster itself", "txn compaction lease snapshot defrag auth move-leader elect lock make-mirror downgrade add remove update promote disarm "+
					"delete passwd grant-role revoke-role grant-permission revoke-permission"),
			},
		}
	}
	get := words("get", key)
	get.Options = slices.Concat(flags("--prefix", "--keys-only", "--count-only", "--print-value-only"), value(number, "--limit", "--rev"), value("ASCEND|DESCEND", "--order"),
		value("CREATE|KEY|MODIFY|VALUE|VERSION", "--sort-by"), value("l|s", "--consistency"))
	watch := words("watch", key)
	watch.Options = slices.Concat(flags("--prefix", "--prev-kv", "--progress-notify"), value(number, "--rev"))
	endpoint := words("endpoint health|status|hashkv")
	endpoint.Options = flags("--cluster")
	id := operands(1, 1, "a name", name, "")
	read := etcd("etcdctl", protocol.Viewer, get, watch, endpoint, words("member|user|role|alarm list"), words("user|role get", id), words("version"))
	read.Timeout = 3600 // watch
	put := words("put", key, operands(1, 1, "a value"+notDash, `[^-].*`, ""))
	put.Options = flags("--prev-kv")
	del := words("del", key)
	del.Options = flags("--prefix", "--prev-kv")
	return []Rule{read, etcd("etcdctl write", protocol.Admin, put, del), podmanRule()}
}

// podmanRule reads what containers there are, and what they say.
func podmanRule() Rule {
	object := operands(1, 16, "a container", `[A-Za-z0-9][A-Za-z0-9_.-]*`, "")
	format := many(value(".{1,300}", "--format"))
	filter := many(value("[A-Za-z0-9][A-Za-z0-9_.=:/-]*", "-f --filter"))
	form := func(f Form, options ...[]Option) Form {
		f.Options = slices.Concat(options...)
		return f
	}
	r := viewer("podman", nil)
	r.Forms = []Form{
		form(words("ps"), format, filter, flags("-a --all", "-q --quiet", "--no-trunc", "--noheading", "-p --pod", "-s --size", "-l --latest"), value(number, "-n --last"), value(list, "--sort")),
		form(words("images"), format, filter, flags("-a --all", "-q --quiet", "--no-trunc", "-n --noheading", "--digests"), value(list, "--sort")),
		form(words("logs", object), flags("-t --timestamps", "-f --follow", "-n --names"), value(number, "--tail"), value(when, "--since", "--until")),
		form(words("stats", operands(0, 16, "a container", object.Pattern, "")), format, flags("--no-stream", "-a --all", "--no-reset", "--no-trunc"), value("[1-9][0-9]?", "-i --interval")),
		form(words("port"), flags("-a --all")),
		words("port", object),
		form(words("volume|network ls"), format, filter, flags("-q --quiet", "--noheading")),
		form(words("system df"), flags("-v --verbose")),
		words("version|info"),
	}
	r.User, r.Timeout = "root", 3600 // logs -f
	r.Denied = []Denied{
		denied("it shows the environment of containers, with their secrets", "inspect"),
		denied("it runs programs", "run exec start restart create build healthcheck top attach unshare kube play init"),
		denied("it changes containers or images; a deployment does that", "stop kill rm rmi pull push load save import export commit cp tag untag login logout prune rename update pause unpause"),
		denied("it reaches another machine", "-r --remote --url --connection -c --identity"),
		denied("it runs other programs, or reads other files", "--runtime --hooks-dir --root --runroot --conmon --config --module --network-cmd-path --tmpdir --storage-opt"),
	}
	return r
}
