# lib.types. A type knows which values it takes (check), and how to make one of several (merge).
lib:
let
  inherit (builtins) all concatLists concatMap filter head isAttrs isBool isFloat isInt isList isPath isString length mapAttrs match zipAttrsWith;
  inherit (lib) concatStringsSep evalModules isDerivation isFunction isStringLike mergeDefaultOption mergeEqualOption mergeOneOption;
  # Late, since modules.nix needs types.
  merged = lib.mergeDefinitions;
  push = lib.modules.pushDownProperties';

  mkOptionType = { name, description ? name, check ? (_: true), merge ? mergeDefaultOption, emptyValue ? { }, nestedTypes ? { } }:
    { _type = "option-type"; inherit name description check merge emptyValue nestedTypes; getSubOptions = _: { }; };
  scalar = name: description: check: mkOptionType { inherit name description check; merge = mergeEqualOption; };
  restricted = type: description: test: type // { inherit description; check = x: type.check x && test x; };

  between = type: what: low: high:
    restricted type "${what} between ${toString low} and ${toString high} (both inclusive)" (x: low <= x && x <= high);
  bits = n: low: high: restricted int "${toString n} bit ${if low < 0 then "" else "un"}signed integer; between ${toString low} and ${toString high} (both inclusive)" (x: low <= x && x <= high);

  separatedString = separator: mkOptionType {
    name = "separatedString";
    description = if separator == "" then "Concatenated string" else "strings concatenated with ${builtins.toJSON separator}";
    check = isString;
    merge = _: defs: concatStringsSep separator (lib.getValues defs);
  };

  listOf = elem: mkOptionType {
    name = "listOf";
    description = "list of ${elem.description}";
    check = isList;
    merge = loc: defs: map (m: m.value) (filter (m: m.isDefined) (concatLists (lib.imap1 (n: def:
      lib.imap1 (i: value: merged (loc ++ [ "[definition ${toString n}-entry ${toString i}]" ]) elem [ { inherit (def) file; inherit value; } ]) def.value) defs)));
    emptyValue.value = [ ];
    nestedTypes.elemType = elem;
  };

  # A lazy one may have attributes whose definitions are all behind a false condition, and fails where such a one is read.
  attrs' = lazy: elem: mkOptionType {
    name = if lazy then "lazyAttrsOf" else "attrsOf";
    description = "${if lazy then "lazy " else ""}attribute set of ${elem.description}";
    check = isAttrs;
    merge = loc: defs:
      let
        values = zipAttrsWith (name: merged (loc ++ [ name ]) elem)
          (concatMap (def: map (d: mapAttrs (_: value: { inherit (d) file; inherit value; }) d.value) (push loc def)) defs);
      in
      mapAttrs (_: m: m.value) (if lazy then values else lib.filterAttrs (_: m: m.isDefined) values);
    emptyValue.value = { };
    nestedTypes.elemType = elem;
  };

  submoduleWith = { modules, specialArgs ? { }, shorthandOnlyDefinesConfig ? false, description ? "submodule", class ? null }:
    let
      evalWith = loc: more: evalModules { prefix = loc; inherit specialArgs class; args.name = if loc == [ ] then "‹name›" else lib.last loc; modules = modules ++ more; };
    in
    mkOptionType {
      name = "submodule";
      inherit description;
      check = x: isAttrs x || isFunction x || isPath x;
      merge = loc: defs: (evalWith loc (map (def:
        if isAttrs def.value && shorthandOnlyDefinesConfig then { _file = def.file; config = def.value; }
        else { _file = def.file; imports = [ def.value ]; }) defs)).config;
      emptyValue.value = { };
    } // { getSubOptions = loc: (evalWith loc [ ]).options; };

  nullOr = type: mkOptionType {
    name = "nullOr";
    description = "null or ${type.description}";
    check = x: x == null || type.check x;
    merge = loc: defs:
      let nulls = filter (def: def.value == null) defs; in
      if nulls == [ ] then type.merge loc defs
      else if length nulls == length defs then null
      else throw "The option `${lib.showOption loc}' is defined both null and not null, in ${lib.showFiles (lib.getFiles defs)}.";
    emptyValue.value = null;
    nestedTypes.elemType = type;
  };

  either = a: b: mkOptionType {
    name = "either";
    description = "${a.description} or ${b.description}";
    check = x: a.check x || b.check x;
    merge = loc: defs:
      if all (def: a.check def.value) defs then a.merge loc defs
      else if all (def: b.check def.value) defs then b.merge loc defs
      else mergeOneOption loc defs;
    nestedTypes = { left = a; right = b; };
  };

  int = scalar "int" "signed integer" isInt;
  str = scalar "str" "string" isString;
  number = either int float;
  float = scalar "float" "floating point number" isFloat;
in
rec {
  inherit mkOptionType separatedString listOf submoduleWith nullOr either int str float number;

  # --- single values
  raw = mkOptionType { name = "raw"; description = "raw value"; merge = mergeOneOption; };
  unspecified = mkOptionType { name = "unspecified"; description = "unspecified value"; };
  bool = scalar "bool" "boolean" isBool;
  boolByOr = mkOptionType { name = "boolByOr"; description = "boolean (merged using or)"; check = isBool; merge = _: defs: lib.any (def: def.value) defs; };
  nonEmptyStr = restricted str "non-empty string" (s: match "[ \t\n]*" s == null);
  singleLineStr = restricted str "(optionally newline-terminated) single-line string" (s: match "[^\n\r]*\n?" s != null) // { merge = loc: defs: lib.removeSuffix "\n" (mergeEqualOption loc defs); };
  strMatching = pattern: restricted str "string matching the pattern ${pattern}" (s: match pattern s != null);
  passwdEntry = type: restricted type "${type.description}, not containing newlines or colons" (s: match "[^:\n]*" "${toString s}" != null);
  enum = values: scalar "enum" "one of ${lib.concatMapStringsSep ", " builtins.toJSON values}" (x: builtins.elem x values);
  path = scalar "path" "absolute path" (x: isStringLike x && builtins.substring 0 1 (toString x) == "/");
  pathInStore = restricted path "path in the Nix store" (x: lib.hasPrefix "${builtins.storeDir}/" (toString x));
  package = scalar "package" "package" (x: isDerivation x || (isStringLike x && lib.hasPrefix "${builtins.storeDir}/" (toString x)));
  shellPackage = restricted package "package which provides a shell" (x: x ? shellPath);
  functionTo = elem: mkOptionType {
    name = "functionTo";
    description = "function that evaluates to a(n) ${elem.description}";
    check = isFunction;
    merge = loc: defs: args: (merged (loc ++ [ "<function body>" ]) elem (map (def: { inherit (def) file; value = def.value args; }) defs)).value;
  };
  optionType = scalar "optionType" "optionType" lib.isOptionType;

  # --- strings of several definitions
  lines = separatedString "\n";
  commas = separatedString ",";
  envVar = separatedString ":";

  # --- numbers
  ints = {
    between = between int "integer";
    unsigned = restricted int "unsigned integer, meaning >=0" (x: x >= 0);
    positive = restricted int "positive integer, meaning >0" (x: x > 0);
    u8 = bits 8 0 255;
    u16 = bits 16 0 65535;
    u32 = bits 32 0 4294967295;
    s8 = bits 8 (-128) 127;
    s16 = bits 16 (-32768) 32767;
    s32 = bits 32 (-2147483648) 2147483647;
  };
  port = ints.u16;
  numbers = {
    between = between number "integer or floating point number";
    nonnegative = restricted number "nonnegative integer or floating point number, meaning >=0" (x: x >= 0);
    positive = restricted number "positive integer or floating point number, meaning >0" (x: x > 0);
  };

  # --- of other types
  nonEmptyListOf = elem: restricted (listOf elem) "non-empty (list of ${elem.description})" (x: x != [ ]) // { emptyValue = { }; };
  attrsOf = attrs' false;
  lazyAttrsOf = attrs' true;
  attrs = mkOptionType { name = "attrs"; description = "attribute set"; check = isAttrs; merge = _: defs: lib.mergeAttrsList (lib.getValues defs); emptyValue.value = { }; };
  anything = mkOptionType {
    name = "anything";
    merge = loc: defs:
      let values = lib.getValues defs; in
      if all (v: isAttrs v && !isDerivation v && !(v ? __functor)) values then (lazyAttrsOf anything).merge loc defs
      else if all isList values then concatLists values
      else if length values > 1 && all isFunction values then x: anything.merge loc (map (def: def // { value = def.value x; }) defs)
      else mergeEqualOption loc defs;
  };
  oneOf = types: lib.foldl' either (head types) (builtins.tail types);
  uniq = type: type // { merge = mergeOneOption; };
  unique = _: uniq;
  addCheck = type: test: type // { check = x: type.check x && test x; };
  coercedTo = from: f: to: mkOptionType {
    name = "coercedTo";
    description = "${to.description} or ${from.description} convertible to it";
    check = x: to.check x || (from.check x && to.check (f x));
    merge = loc: defs: to.merge loc (map (def: def // { value = if to.check def.value then def.value else f def.value; }) defs);
    inherit (to) emptyValue;
  };

  # --- modules
  submodule = modules: submoduleWith { modules = lib.toList modules; shorthandOnlyDefinesConfig = true; };
  deferredModule = mkOptionType {
    name = "deferredModule";
    description = "module";
    check = x: isAttrs x || isFunction x || isPath x;
    merge = _: defs: { imports = map (def: lib.setDefaultModuleLocation def.file def.value) defs; };
    emptyValue.value = { };
  };
}
