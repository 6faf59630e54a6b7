# A fleet of two machines in VMs: `nix build .#checks.x86_64-linux.vm`. The modules start controller and agent as enrolment
# leaves them, and a service reads its secret.
{
  name = "nix-infra";

  nodes.ctl = { pkgs, ... }: {
    services.nix-infra-controller = { enable = true; openFirewall = true; };
    environment.systemPackages = [ pkgs.nix-infra ];
  };

  nodes.web1 = { pkgs, ... }: {
    services.openssh.enable = true;
    services.nix-infra-agent = {
      enable = true;
      closeSSH = true;
      policy.files.roots = [ "/var/lib/app" ];
      policy.tunnels = [ { address = "127.0.0.1:8080"; } ];
      healthChecks = [ { name = "app"; kind = "unit"; unit = "app.service"; } ];
    };
    nix-infra.secrets."app.token".units = [ "app" ];
    systemd.services.app = {
      script = ''
        cp "$CREDENTIALS_DIRECTORY/app.token" /run/app/seen
        exec ${pkgs.coreutils}/bin/sleep infinity
      '';
      serviceConfig.RuntimeDirectory = "app";
    };
  };

  testScript = ''
    start_all()
    cli = "cd /root/fleet && SECRETS_PASS=test nix-infra --batch"

    # Not enrolled: nothing runs, and nothing has failed.
    for machine, unit in [(ctl, "nix-infra-controller"), (web1, "nix-infra-agent")]:
        machine.wait_for_unit("multi-user.target")
        machine.fail(f"systemctl is-active {unit}")
        machine.fail(f"systemctl is-failed {unit}")

    ctl.succeed("mkdir -p /root/fleet && " + cli + " init --fleet test --user ada --controller tls://ctl:4222")

    # By files, as where there is no SSH.
    ctl.succeed("nix-infra-controller request --name ctl > /root/ctl.request")
    ctl.succeed(cli + " enroll --controller --request /root/ctl.request --answer /root/ctl.answer --address ctl --offline")
    ctl.succeed("nix-infra-controller load /root/ctl.answer && systemctl start nix-infra-controller")
    ctl.wait_for_unit("nix-infra-controller")
    ctl.succeed("test $(ps -o user= -p $(systemctl show -P MainPID nix-infra-controller)) != root")

    request = web1.succeed("nix-infra-agent request --name web1")
    ctl.succeed(f"cat > /root/web1.request <<'EOF'\n{request}EOF")
    ctl.succeed(cli + " enroll --request /root/web1.request --answer /root/web1.answer")
    answer = ctl.succeed("cat /root/web1.answer")
    web1.succeed(f"nix-infra-agent load - <<'EOF'\n{answer}\nEOF")
    web1.succeed("systemctl start nix-infra-agent")
    web1.wait_for_unit("nix-infra-agent")
    ctl.wait_until_succeeds(cli + " ping web1", timeout=60)
    ctl.succeed(cli + " exec web1 -- systemctl status nix-infra-agent")

    # sshd listens, and the network does not get to it.
    web1.wait_for_open_port(22)
    ctl.fail("timeout 5 bash -c '< /dev/tcp/web1/22'")

    # The service reads what the agent would have put there.
    web1.succeed("mkdir -m 0700 -p /root/secrets && echo -n hunter2 | systemd-creds encrypt --name=app.token - /root/secrets/app.token")
    web1.succeed("systemctl start app")
    web1.wait_until_succeeds("test \"$(cat /run/app/seen)\" = hunter2", timeout=30)

    # Root's files of another enrolment are the controller's when it starts.
    ctl.succeed("touch /var/lib/nix-infra-controller/roots && systemctl restart nix-infra-controller")
    ctl.succeed("test $(stat -c %U /var/lib/nix-infra-controller/roots) = nix-infra-controller")
  '';
}
