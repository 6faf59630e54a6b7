# The type of a machine that stands alone. nix-infra.yaml says which nodes are of which type (node_module).
{ pkgs, ... }:
{
  environment.systemPackages = [ pkgs.curl pkgs.jq ];
}
