# infrastructure.oci-containers: containers as units, podman-NAME.service, which are in the mesh where they have an app. The
# options are those of the earlier tool's module; what a container is told as a secret is in no argument.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.infrastructure.oci-containers;
  strings = description: mkOption { type = types.listOf types.str; default = [ ]; inherit description; };
  orNull = description: mkOption { type = types.nullOr types.str; default = null; inherit description; };
  # A container that has a port is one that others may look for.
  inMesh = c: c.app.port != null && config.infrastructure.mesh.enable;

  container = types.submodule ({ name, ... }: {
    options = {
      app = {
        name = mkOption { type = types.str; default = name; description = "What it is called in the mesh."; };
        serviceGroup = mkOption { type = types.enum [ "frontends" "backends" "services" ]; default = "backends"; description = "Its group in the mesh."; };
        protocol = mkOption { type = types.str; default = "http"; description = "What it speaks."; };
        port = mkOption { type = types.nullOr types.port; default = null; description = "Where it listens; null: it is not in the mesh."; };
        auxPorts = mkOption { type = types.listOf types.port; default = [ ]; description = "Further ports that other nodes may reach."; };
        path = mkOption { type = types.str; default = ""; description = "What clients ask for."; };
        envPrefix = mkOption { type = types.str; default = ""; description = "What the names of clients' variables begin with."; };
      };
      bindToIp = mkOption { type = types.nullOr types.str; default = "127.0.0.1"; description = "The address at which it is registered; null: the node's overlay address."; };
      image = mkOption { type = types.str; description = "The image, with its registry."; };
      imageFile = mkOption { type = types.nullOr types.package; default = null; description = "An archive that the image is loaded from, such as dockerTools makes."; };
      login = {
        registry = orNull "Where to log in.";
        username = orNull "As whom.";
        passwordFile = orNull "File with the password, as a string.";
      };
      cmd = strings "Arguments of the image's program.";
      labels = mkOption { type = types.attrsOf types.str; default = { }; description = "Labels."; };
      entrypoint = orNull "Another program than the image's.";
      environment = mkOption { type = types.attrsOf types.str; default = { }; description = "Variables. Everybody on the machine can read them."; };
      environmentFiles = strings "Files with variables.";
      environmentSecrets = mkOption {
        type = types.listOf (types.submodule {
          options = {
            name = mkOption { type = types.str; description = "Name of the secret."; };
            envVar = mkOption { type = types.str; description = "Variable that gets its value, which is one line."; };
          };
        });
        default = [ ];
        description = "Variables whose values are secrets.";
      };
      execHooks.ExecStartPre = strings "Commands that run before it starts.";
      log-driver = mkOption { type = types.str; default = "journald"; description = "Where its output goes."; };
      ports = strings "Ports, as podman's --publish has them.";
      user = orNull "Whom it runs as.";
      volumes = strings "Volumes, as podman's --volume has them.";
      workdir = orNull "Its working folder.";
      dependsOn = strings "Containers that have to run before it.";
      networkType = mkOption { type = types.nullOr (types.enum [ "host" ]); default = null; description = "`host`: the node's own network."; };
      hostname = orNull "Its host name.";
      extraOptions = strings "Further options of podman run.";
      autoStart = mkOption { type = types.bool; default = true; description = "Whether it starts with the machine."; };
    };
  });

  unitOf = name: "podman-${name}";

  unit = name: c:
    let
      program = "${config.virtualisation.podman.package}/bin/podman";
      option = flag: value: lib.optionals (value != null) [ flag value ];
      each = flag: lib.concatMap (value: [ flag value ]);
      words = [ "run" "--rm" "--replace" "--name=${name}" "--cidfile=/run/${unitOf name}.ctr-id" "--cgroups=no-conmon" "--sdnotify=conmon" "-d" "--log-driver=${c.log-driver}" ]
        ++ option "--entrypoint" c.entrypoint ++ option "--user" c.user ++ option "--workdir" c.workdir ++ option "--hostname" c.hostname
        ++ option "--network" c.networkType
        ++ each "--label" (lib.mapAttrsToList (n: v: "${n}=${v}") c.labels)
        ++ each "--env" (lib.mapAttrsToList (n: v: "${n}=${v}") c.environment)
        ++ each "--env-file" c.environmentFiles ++ each "--publish" c.ports ++ each "--volume" c.volumes ++ c.extraOptions;
    in
    {
      description = "container ${name}";
      wantedBy = lib.optional c.autoStart "multi-user.target";
      requires = map (n: "${unitOf n}.service") c.dependsOn;
      after = [ "network-online.target" ] ++ map (n: "${unitOf n}.service") c.dependsOn;
      wants = [ "network-online.target" ];
      path = [ "/run/wrappers" pkgs.coreutils ];
      preStart = ''
        ${program} rm --force --ignore ${name}
        rm -f /run/${unitOf name}.ctr-id
        ${lib.optionalString (c.imageFile != null) "${program} load --input ${c.imageFile}"}
        ${lib.optionalString (c.login.registry != null) "${program} login --username ${lib.escapeShellArg c.login.username} --password-stdin ${lib.escapeShellArg c.login.registry} < ${lib.escapeShellArg c.login.passwordFile}"}
        ${lib.concatStringsSep "\n" c.execHooks.ExecStartPre}
      '';
      script = ''
        : > "$RUNTIME_DIRECTORY/env"
        ${lib.concatMapStrings (s: ''
          printf '%s=%s\n' ${lib.escapeShellArg s.envVar} "$(cat "$CREDENTIALS_DIRECTORY"/${lib.escapeShellArg s.name})" >> "$RUNTIME_DIRECTORY/env"
        '') c.environmentSecrets}
        exec ${program} ${lib.escapeShellArgs words} --env-file "$RUNTIME_DIRECTORY/env" ${lib.escapeShellArgs ([ c.image ] ++ c.cmd)}
      '';
      preStop = "${program} stop --ignore --cidfile=/run/${unitOf name}.ctr-id";
      postStop = "${program} rm --force --ignore --cidfile=/run/${unitOf name}.ctr-id";
      serviceConfig = {
        Type = "notify";
        NotifyAccess = "all";
        SuccessExitStatus = [ 143 137 ]; # what a container ends with that was told to, and one that did not listen
        Restart = "always";
        RestartSec = 5;
        TimeoutStartSec = 0;
        TimeoutStopSec = 120;
        RuntimeDirectory = unitOf name;
        RuntimeDirectoryMode = "0700";
      };
    };
in
{
  options.infrastructure.oci-containers = {
    backend = mkOption { type = types.enum [ "podman" ]; default = "podman"; description = "What runs them."; };
    containers = mkOption { type = types.attrsOf container; default = { }; description = "The containers of this node, by name."; };
  };

  config = lib.mkIf (cfg.containers != { }) {
    infrastructure.podman.enable = true;

    systemd.services = lib.mapAttrs' (name: c: lib.nameValuePair (unitOf name) (unit name c)) cfg.containers;

    nix-infra.secrets = lib.mkMerge (lib.concatLists (lib.mapAttrsToList (name: c:
      map (s: { ${s.name}.units = [ (unitOf name) ]; }) c.environmentSecrets) cfg.containers));

    infrastructure.mesh.services = lib.mapAttrs' (name: c: lib.nameValuePair c.app.name {
      unit = unitOf name;
      group = c.app.serviceGroup;
      inherit (c) bindToIp;
      inherit (c.app) port auxPorts protocol path envPrefix;
    }) (lib.filterAttrs (_: inMesh) cfg.containers);
  };
}
