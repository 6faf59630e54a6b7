# One of the three programs of nix-infra, static: the CLI, the agent, or the controller. Needs Go 1.26 or newer, which need not
# be the one that nixpkgs builds everything else with.
{ lib, buildGoModule, buildGo126Module ? buildGoModule, program ? "nix-infra", version ? "0.1.0" }:
let
  folders = {
    nix-infra = "cli/nix-infra";
    nix-infra-agent = "agent/nix-infra-agent";
    nix-infra-controller = "controller/nix-infra-controller";
  };
in
buildGo126Module {
  pname = program;
  inherit version;

  # All that is Go, and what it embeds, so that a change of a document builds nothing anew. e2e is in it for the hash below: what is vendored
  # is what any package of the tree imports.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [ ../go.mod ../go.sum ../agent ../cli ../controller ../nix ../protocol ../e2e ../nixos-module ../examples ];
  };

  # The NAR hash of the folder that `go mod vendor` makes. After a change of go.mod, `go test ./e2e/nar` says the new one.
  vendorHash = "sha256-ATd0aT685dClGYA4nMj49LMV9XgjWF04b6AInYAr4Ns=";

  subPackages = [ folders.${program} ];
  env.CGO_ENABLED = 0;
  ldflags = [ "-s" "-w" "-X github.com/nix-infra/nix-infra/protocol.build=${version}" ];

  # Assistants' settings may name the MCP servers so, as `make build` has them.
  postInstall = lib.optionalString (program == "nix-infra") ''
    for server in cluster machine dev; do ln -s nix-infra "$out/bin/nix-infra-$server-mcp"; done
  '';

  # The tests need systemd, ssh and a broker's time: `make test` runs them.
  doCheck = false;

  meta = {
    description = "Deploys to fleets of NixOS machines that pull, prove, and roll back by themselves";
    license = lib.licenses.mit;
    mainProgram = program;
    platforms = if program == "nix-infra" then lib.platforms.linux ++ lib.platforms.darwin else lib.platforms.linux;
  };
}
