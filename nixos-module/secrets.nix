# nix-infra.secrets: gives a node's secrets to the services that need them. A service reads the value from a file,
# $CREDENTIALS_DIRECTORY/NAME, that only it sees. docs/nixos.md has an example, docs/secrets.md the rest.
{ config, lib, ... }:
let
  inherit (lib) mkOption types;
  secrets = config.nix-infra.secrets;
  service = lib.removeSuffix ".service";
  credential = name: "${name}:/root/secrets/${name}"; # as the agent encrypts it: for this name and no other
  # A unit of its own, and no addition to one: what it runs is said nowhere.
  unknown = unit: let s = config.systemd.services.${unit}; in s.overrideStrategy != "asDropin" && s.script == "" && !(s.serviceConfig ? ExecStart);
  isInstance = unit: builtins.match ".+@.+" unit != null;
  isName = name: builtins.match "[A-Za-z0-9_][A-Za-z0-9._@+-]*" name != null && lib.stringLength name <= 128;
in
{
  options.nix-infra.secrets = mkOption {
    default = { };
    example.${"[%%secrets/db.password%%]"}.units = [ "app" ];
    description = ''
      The secrets that services of this node load, by name. Written as the placeholder in a node's own file, the name also
      says that the node needs the secret.
    '';
    type = types.attrsOf (types.submodule {
      options.units = mkOption {
        type = types.nonEmptyListOf (types.strMatching "[A-Za-z0-9:_.\\\\@-]+");
        example = [ "app" "worker.service" ];
        description = ''
          The services that load it, with `.service` or without. Each fails to start where the node does not have the
          secret, and is restarted when it gets another value.
        '';
      };
    });
  };

  config = lib.mkIf (secrets != { }) {
    assertions = lib.concatLists (lib.mapAttrsToList (name: secret: [
      {
        assertion = isName name;
        message = "nix-infra.secrets: \"${name}\" is no secret's name: 1 to 128 of A-Z a-z 0-9 . _ @ + -, the first one of A-Z a-z 0-9 _."
          + lib.optionalString (lib.hasInfix "[%%" name) " Placeholders are filled in only in the node's own file, nodes/NODE.nix.";
      }
      {
        assertion = !lib.any (u: lib.hasInfix "." u && lib.elem (lib.last (lib.splitString "." u)) [ "socket" "timer" "path" "target" "mount" "slice" ]) secret.units;
        message = "nix-infra.secrets.\"${name}\".units: only services load secrets, not ${lib.concatStringsSep ", " secret.units}.";
      }
    ] ++ map (unit: {
      assertion = !unknown (service unit);
      message = "nix-infra.secrets.\"${name}\".units: no module says what ${service unit}.service runs. Is that its name? "
        + "For one that a package brings, set systemd.services.\"${service unit}\".overrideStrategy = \"asDropin\".";
    }) (lib.filter (u: !lib.hasInfix "." (service u)) secret.units)) secrets);

    systemd.services = lib.mkMerge (lib.concatLists (lib.mapAttrsToList (name: secret:
      map (unit: {
        ${unit} = {
          serviceConfig.LoadCredentialEncrypted = [ (credential name) ];
          # An instance is what its template is, and this.
          overrideStrategy = lib.mkIf (isInstance unit) (lib.mkDefault "asDropin");
        };
      }) (lib.unique (map service secret.units))
    ) secrets));
  };
}
