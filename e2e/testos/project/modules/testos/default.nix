# testos: evaluates modules and builds a system with NixOS's interfaces out of raw derivations.
# It stands in for nixpkgs' lib.nixosSystem where there is no nixpkgs. README.md lists the options.
{ nodeName, nixVersion, system, modules }:
let
  inherit (builtins)
    all attrNames concatLists concatMap concatStringsSep elem filter head isAttrs isFunction isList
    isPath isString length toJSON zipAttrsWith;

  testos = import ./derivations.nix { inherit system; };

  defaults = {
    units = { };
    etc = { };
    activationScript = "";
    buildScript = "";
    packages = [ ];
    kernel = "6.12.0";
    firewall = "";
    infrastructure = { };
  };

  # Modules may look at the merged result: only the *names* that a module sets must not depend on it.
  arguments = { inherit nodeName nixVersion system testos config; };

  load = module:
    let value = if isPath module || isString module then import module else module; in
    if isFunction value then value arguments else value;

  withImports = module:
    let attrs = load module; in
    [ (removeAttrs attrs [ "imports" ]) ] ++ concatMap withImports (attrs.imports or [ ]);

  lines = [ "activationScript" "buildScript" "firewall" ];

  merge = path: values:
    let first = head values; in
    if length values == 1 then first
    else if all isAttrs values && !(first ? outPath) then
      zipAttrsWith (name: merge (path ++ [ name ])) values
    else if all isList values then concatLists values
    else if length path == 1 && elem (head path) lines then concatStringsSep "\n" values
    else if all (value: value == first) values then first
    else throw "testos: option ${concatStringsSep "." path} is set to different values: ${toJSON values}";

  merged = zipAttrsWith (name: merge [ name ]) (concatMap withImports modules);

  unknown = filter (name: !(defaults ? ${name})) (attrNames merged);

  config = defaults // merged;
in
{
  config.system.build.toplevel =
    if unknown != [ ] then
      throw "testos: there is no option ${concatStringsSep ", " unknown}; there are ${concatStringsSep ", " (attrNames defaults)}"
    else
      import ./system.nix { inherit nodeName nixVersion system testos config; };
}
