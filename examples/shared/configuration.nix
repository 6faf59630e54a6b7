# What all nodes have in common, and the places that the rest goes to. On a node, all of this lies flat in /etc/nixos:
# cluster_node.nix is the node's type, [%%nodeName%%].nix its own file, and nix-infra/ the agent, which comes with each deployment.
{ lib, pkgs, ... }:
{
  imports = [ ./hardware-configuration.nix ./nix-infra ] ++ lib.filter builtins.pathExists [
    ./networking.nix
    ./modules/default.nix
    ./cluster_node.nix
    ./control_node.nix
    ./app_modules/default.nix
    ./[%%nodeName%%].nix
  ];

  system.stateVersion = "[%%nixVersion%%]";
  networking.hostName = "[%%nodeName%%]";

  # Nothing is open but what a module opens. sshd's port is closed where nix-infra.yaml has close_ssh: `nix-infra ssh` reaches
  # sshd through the agent.
  networking.firewall.enable = true;
  services.openssh = {
    enable = true;
    settings = {
      PermitRootLogin = "prohibit-password";
      PasswordAuthentication = false;
      KbdInteractiveAuthentication = false;
    };
  };
  users.users.root.openssh.authorizedKeys.keys = [ "[%%sshKey%%]" ];

  nix.settings.experimental-features = [ "nix-command" "flakes" ];
  nixpkgs.config.allowUnfree = true;
  zramSwap.enable = true;
  boot.tmp.cleanOnBoot = true;
  environment.systemPackages = [ pkgs.git ];
}
