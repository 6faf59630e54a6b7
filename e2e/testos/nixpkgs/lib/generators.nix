# lib.generators
lib:
let
  inherit (builtins) isAttrs isBool isFunction isList isString;
in
rec {
  mkValueStringDefault = _: value: if isBool value then lib.boolToString value else toString value;
  mkKeyValueDefault = { mkValueString ? mkValueStringDefault { } }: separator: key: value: "${key}${separator}${mkValueString value}";
  toKeyValue = { mkKeyValue ? mkKeyValueDefault { } "=", listsAsDuplicateKeys ? false, indent ? "" }: attrs:
    lib.concatStrings (lib.concatLists (lib.mapAttrsToList (key: value:
      map (v: "${indent}${mkKeyValue key v}\n") (if listsAsDuplicateKeys then lib.toList value else [ value ])) attrs));
  toINI = { mkSectionName ? lib.id, mkKeyValue ? mkKeyValueDefault { } "=", listsAsDuplicateKeys ? false }: attrs:
    lib.concatStringsSep "\n" (lib.mapAttrsToList (name: section: "[${mkSectionName name}]\n${toKeyValue { inherit mkKeyValue listsAsDuplicateKeys; } section}") attrs);
  toJSON = _: builtins.toJSON;
  toYAML = toJSON; # JSON is YAML, and nixpkgs does no more

  # A value as one would write it, for messages.
  toPretty = _: value:
    let show = depth: v:
      if isString v then lib.escapeNixString v
      else if v == null then "null"
      else if isFunction v then "<function>"
      else if lib.isDerivation v then "<derivation ${v.name or "?"}>"
      else if isAttrs v then if depth > 2 then "{ ... }" else "{ ${lib.concatStringsSep " " (lib.mapAttrsToList (n: x: "${lib.escapeNixIdentifier n} = ${show (depth + 1) x};") v)} }"
      else if isList v then if depth > 2 then "[ ... ]" else "[ ${lib.concatMapStringsSep " " (show (depth + 1)) v} ]"
      else if isBool v then lib.boolToString v
      else toString v;
    in show 0 value;
}
