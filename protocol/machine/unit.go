package machine

// The systemd units that enrolment puts onto a machine whose configuration has none: by SSH, or by the agent itself where a
// machine joins with a token.

// SearchPath is where the programs that ours need (nix, systemd's) are, on NixOS and elsewhere.
const SearchPath = "/run/wrappers/bin:/run/current-system/sw/bin:/nix/var/nix/profiles/default/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// LastingUnits and PassingUnits are where a unit can be put. NixOS's /etc/systemd/system is a link into the store: there
// the unit lasts until the next boot, and the deployed configuration brings the lasting one.
const (
	LastingUnits = "/etc/systemd/system"
	PassingUnits = "/run/systemd/system"
)

// The agent as a service. AgentBinary is where its program is put.
const (
	AgentService = "nix-infra-agent.service"
	AgentBinary  = "/var/lib/nix-infra-agent/bin/nix-infra-agent"
)

// AgentUnit is the agent's unit. It has no sandbox: what the agent runs, an activation, has to change the whole machine. It
// is the last that the kernel kills for memory, and it never stays down: while it is gone the machine can't be reached.
const AgentUnit = `[Unit]
Description=nix-infra agent
After=dbus.service nix-daemon.socket
StartLimitIntervalSec=0

[Service]
Type=notify
Environment=PATH=` + SearchPath + `
ExecStart=` + AgentBinary + ` run
Restart=always
RestartSec=1
WatchdogSec=60
KillMode=mixed
TimeoutStopSec=10
OOMScoreAdjust=-500
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target
`
