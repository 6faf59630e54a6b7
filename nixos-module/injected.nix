# nix-infra/default.nix in a node's tree: the modules, and what makes them this node's. `nix-infra deploy` puts it there,
# with the other modules in module/ and settings.json; the node's agent adds facts.json. docs/nixos.md tells more.
{ config, lib, ... }:
let
  read = file: if builtins.pathExists file then builtins.fromJSON (builtins.readFile file) else { };
  facts = read ./facts.json;
  settings = read ./settings.json;

  # What the agent has put into the store of this node: an output that is there already, by its name and hash. So nothing
  # is fetched or built, and where it is not there, there is nothing to be done about it here.
  stored = program: derivation {
    inherit (program) name;
    inherit (facts) system;
    outputHashMode = "recursive";
    outputHashAlgo = "sha256";
    outputHash = program.hash;
    builder = "/bin/sh";
    args = [ "-c" "echo '${program.name} of hash ${program.hash} is not in this Nix store; the agent of ${facts.node} puts it into its own, so build there: nix-infra deploy --build=node' >&2; exit 1" ];
  };
in
{
  imports = [ ./module ];

  services.nix-infra-agent = {
    enable = lib.mkDefault (facts ? agent);
    package = lib.mkIf (facts ? agent) (lib.mkDefault (stored facts.agent));
    closeSSH = lib.mkDefault (settings.closeSSH or false);
  };

  services.nix-infra-controller = lib.mkIf (facts ? controller) {
    enable = lib.mkDefault true;
    package = lib.mkDefault (stored facts.controller);
    openFirewall = lib.mkDefault true;
    configFile = lib.mkIf (facts.controller.settings or false) (lib.mkDefault "/var/lib/nix-infra-controller/controller.yaml");
  };

  warnings = lib.optional (!(facts ? agent || config.services.nix-infra-agent.enable)) (
    "nix-infra/facts.json is missing, so this system has no agent, and the one of before lasts until the next boot: "
    + "the agent that runs is too old to bring it; enrol the machine again, and deploy again."
  );
}
