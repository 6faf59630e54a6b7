# lib.options, and what definitions are wrapped in: conditions, priorities, order.
lib:
let
  inherit (lib) concatMapStringsSep concatStringsSep types;
in
rec {
  mkOption = attrs: attrs // { _type = "option"; };
  mkEnableOption = what: mkOption { type = types.bool; default = false; example = true; description = "Whether to enable ${what}."; };
  mkPackageOption = pkgs: name: { nullable ? false, default ? name, example ? null, pkgsText ? "pkgs", extraDescription ? "" }:
    mkOption ({
      type = if nullable then types.nullOr types.package else types.package;
      description = "The ${if builtins.isList name then lib.last name else name} package to use. ${extraDescription}";
      defaultText = literalExpression "${pkgsText}.${concatStringsSep "." (lib.toList default)}";
    } // lib.optionalAttrs (default != null) { default = lib.getAttrFromPath (lib.toList default) pkgs; });

  mkIf = condition: content: { _type = "if"; inherit condition content; };
  mkMerge = contents: { _type = "merge"; inherit contents; };
  mkOverride = priority: content: { _type = "override"; inherit priority content; };
  mkOptionDefault = mkOverride 1500;
  mkDefault = mkOverride 1000;
  mkImageMediaOverride = mkOverride 60;
  mkForce = mkOverride 50;
  mkVMOverride = mkOverride 10;
  mkOrder = priority: content: { _type = "order"; inherit priority content; };
  mkBefore = mkOrder 500;
  mkAfter = mkOrder 1500;

  literalExpression = text: { _type = "literalExpression"; inherit text; };
  literalMD = text: { _type = "literalMD"; inherit text; };

  isType = type: x: x._type or null == type;
  isOption = isType "option";
  isOptionType = isType "option-type";
  getValues = map (def: def.value);
  getFiles = map (def: def.file);
  optionAttrSetToDocList = throw "lib.optionAttrSetToDocList: the stand-in of nixpkgs makes no manual";

  showOption = loc: concatMapStringsSep "." (part: if builtins.match "[a-zA-Z_][a-zA-Z0-9_'-]*|<.*>|\\*|\\[.*]" part != null then part else lib.escapeNixString part) loc;
  showFiles = files: concatMapStringsSep " and " (file: "`${file}'") files;
  showDefs = concatMapStringsSep "" (def: "\n- In `${toString def.file}': ${lib.generators.toPretty { } def.value}");

  # How several definitions of one option become one value.
  mergeEqualOption = loc: defs:
    if lib.all (def: def.value == (builtins.head defs).value) defs then (builtins.head defs).value
    else throw "The option `${showOption loc}' has conflicting definition values:${showDefs defs}\nUse `lib.mkForce value` or `lib.mkDefault value` to change the priority on any of these definitions.";
  mergeOneOption = loc: defs:
    if builtins.length defs == 1 then (builtins.head defs).value
    else throw "The option `${showOption loc}' is defined multiple times while it's expected to be unique.\nDefinition values:${showDefs defs}";
  mergeUniqueOption = _: mergeOneOption;
  mergeDefaultOption = loc: defs:
    let values = getValues defs; in
    if builtins.length values == 1 then builtins.head values
    else if lib.all lib.isFunction values then x: mergeDefaultOption loc (map (def: def // { value = def.value x; }) defs)
    else if lib.all builtins.isList values then builtins.concatLists values
    else if lib.all builtins.isAttrs values then lib.mergeAttrsList values
    else if lib.all builtins.isBool values then lib.any lib.id values
    else if lib.all builtins.isString values then lib.concatStrings values
    else mergeEqualOption loc defs;

  mkAliasOptionModule = from: to: { config, options, ... }: {
    options = lib.setAttrByPath from (mkOption {
      type = (lib.getAttrFromPath to options).type;
      description = "Alias of `${showOption to}`.";
      apply = _: lib.getAttrFromPath to config;
    });
    config = lib.setAttrByPath to (mkMerge (lib.optionals (lib.getAttrFromPath from options).isDefined (lib.getAttrFromPath from options).definitions));
  };
  mkRenamedOptionModule = mkAliasOptionModule;
  mkRemovedOptionModule = path: why: { options, ... }: {
    options = lib.setAttrByPath path (mkOption { visible = false; apply = _: throw "The option `${showOption path}' can no longer be used since it's been removed. ${why}"; });
    config.assertions = let opt = lib.getAttrFromPath path options; in [
      { assertion = !opt.isDefined; message = "The option definition `${showOption path}' in ${showFiles opt.files} no longer has any effect; please remove it.\n${why}"; }
    ];
  };
}
