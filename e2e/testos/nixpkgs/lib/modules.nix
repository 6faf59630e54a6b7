# lib.modules: evaluates modules. Those that are imported are collected, their declarations and definitions merged by
# option, and each option's value made from its definitions by its type. All of it is lazy: modules look at the result.
lib:
let
  inherit (builtins)
    addErrorContext all any attrNames concatLists concatMap filter foldl' head isAttrs isPath isString length mapAttrs removeAttrs
    zipAttrsWith;
  inherit (lib) isFunction isOption showDefs showOption types;

  # --- modules

  reserved = [ "_class" "_file" "key" "imports" "disabledModules" "freeformType" ];
  structured = reserved ++ [ "options" "config" "meta" ];

  # What a module says, by parts. One without `options` and `config` is all config.
  normalize = file: key: m:
    let
      unknown = attrNames (removeAttrs m structured);
      parts =
        if m ? config || m ? options then
          if unknown != [ ] then
            throw "Module `${file}' has an unsupported attribute `${head unknown}'. This is caused by introducing a top-level `config' or `options' attribute. Add configuration attributes immediately on the top level instead, or move all of them into the explicit `config' attribute."
          else { options = m.options or { }; config = m.config or { }; }
        else { options = { }; config = removeAttrs m reserved; };
    in
    if !isAttrs m then throw "Module `${file}' is not an attribute set, and no function that makes one."
    else if m ? _type then normalize file key { config = m; }
    else parts // { inherit file key; imports = m.imports or [ ]; freeform = m.freeformType or null; };

  # A module from what stands in a list of imports: a path, a function or a set.
  load = call: parent: n: m:
    if isPath m || isString m then
      let file = builtins.unsafeDiscardStringContext (toString m); in read call file file (import m)
    else read call parent.file (m.key or "${parent.key}:anon-${toString n}") m;
  read = call: file: key: m:
    let value = if isFunction m then call file m else m; in
    addErrorContext "while evaluating the module `${file}':" (normalize (value._file or file) (value.key or key) value);

  collect = call: modules:
    lib.reverseList (builtins.genericClosure {
      startSet = lib.imap1 (load call { file = "<unknown-file>"; key = ""; }) modules;
      operator = m: lib.imap1 (load call m) m.imports;
    });

  # --- definitions

  # One definition of a set as definitions of its attributes: what is around the set goes around each of these.
  push = loc: def:
    let
      wrap = f: content: map (mapAttrs (_: f)) (go content);
      go = value:
        if !isAttrs value then
          throw "The option `${showOption loc}' is a set of options, and is defined as something else:${showDefs [ def ]}"
        else if !(value ? _type) then [ value ]
        else if value._type == "merge" then concatMap go value.contents
        else if value._type == "if" then wrap (lib.mkIf value.condition) value.content
        else if value._type == "override" then wrap (lib.mkOverride value.priority) value.content
        else if value._type == "order" then wrap (lib.mkOrder value.priority) value.content
        else [ value ];
    in
    map (value: { inherit (def) file; inherit value; }) (go def.value);

  # One definition of an option as values with their priority and order. What is in an override is not looked at: another
  # definition may win over it, and it may be an error then.
  discharge = def:
    let value = def.value; in
    if !(isAttrs value && value ? _type) then [ def ]
    else if value._type == "merge" then concatMap (value: discharge (def // { inherit value; })) value.contents
    else if value._type == "if" then lib.optionals value.condition (discharge (def // { value = value.content; }))
    else if value._type == "order" then discharge (def // { order = value.priority; value = value.content; })
    else if value._type == "override" then [ ({ inherit (value) priority; } // def // { value = value.content; }) ]
    else [ def ];

  # The value of an option of this type from its definitions, { file, value } each.
  mergeDefinitions = loc: type: defs:
    let
      discharged = concatMap discharge defs;
      priority = def: def.priority or 100;
      highestPrio = foldl' (best: def: lib.min best (priority def)) 9999 discharged;
      chosen = concatMap discharge (filter (def: priority def == highestPrio) discharged);
      ordered = if any (def: def ? order) chosen then lib.sortOn (def: def.order or 1000) chosen else chosen;
      wrong = filter (def: !type.check def.value) ordered;
      isDefined = discharged != [ ];
    in
    {
      inherit isDefined highestPrio;
      defs = map (def: { inherit (def) file value; }) ordered;
      value =
        if ordered != [ ] then
          if wrong == [ ] then addErrorContext "while evaluating the option `${showOption loc}':" (type.merge loc ordered)
          else throw "A definition for option `${showOption loc}' is not of type `${type.description}'. Definition values:${showDefs wrong}"
        else type.emptyValue.value or (throw "The option `${showOption loc}' was accessed but has no value defined. Try setting the option.");
    };

  # --- options

  # Of a type without others in it, its name: declarations of one such type are one.
  simple = option: if (option.type or types.unspecified).nestedTypes == { } && option.type.name or "" != "submodule" then option.type.description or "" else option;

  evalOption = loc: declarations: defs:
    let
      declaration =
        if length declarations == 1 || all (d: simple d.options == simple (head declarations).options) declarations
        then foldl' (a: b: a // b) { } (map (d: d.options) declarations)
        else throw "The option `${showOption loc}' in `${(head declarations).file}' is already declared in `${(lib.last declarations).file}'.";
      type = declaration.type or types.unspecified;
      default = lib.optional (declaration ? default) { inherit (head declarations) file; value = lib.mkOptionDefault declaration.default; };
      merged = mergeDefinitions loc type (defs ++ default);
      value =
        if declaration.readOnly or false && length merged.defs > 1 then
          throw "The option `${showOption loc}' is read-only, but it's set multiple times. Definition values:${showDefs merged.defs}"
        else merged.value;
    in
    declaration // {
      inherit loc type;
      inherit (merged) isDefined highestPrio;
      value = if declaration ? apply then declaration.apply value else value;
      definitions = lib.getValues merged.defs;
      definitionsWithLocations = merged.defs;
      files = lib.getFiles merged.defs;
      declarations = map (d: d.file) declarations;
      __toString = _: showOption loc;
    };

  # Declarations { file, options } and definitions { file, value } of a set of options, name by name.
  mergeTree = loc: declarations: definitions:
    let
      byName = of: list: zipAttrsWith (_: values: values) (map (x: mapAttrs (_: value: { inherit (x) file; ${of} = value; }) x.${of}) list);
      declared = byName "options" declarations;
      defined = byName "value" definitions;
      parts = mapAttrs (name: ds:
        let here = loc ++ [ name ]; defs = defined.${name} or [ ]; in
        if all (d: isOption d.options) ds then
          let option = evalOption here ds defs; in { inherit option; inherit (option) value; unmatched = [ ]; }
        else if any (d: isOption d.options) ds then
          throw "The option `${showOption here}' is declared in `${(lib.findFirst (d: isOption d.options) null ds).file}', and options below it in `${(lib.findFirst (d: !isOption d.options) null ds).file}'."
        else mergeTree here ds (concatMap (push here) defs)) declared;
      undeclared = removeAttrs defined (attrNames declared);
    in
    {
      option = mapAttrs (_: part: part.option) parts;
      value = mapAttrs (_: part: part.value) parts;
      unmatched = concatLists (lib.mapAttrsToList (_: part: part.unmatched) parts)
        ++ concatLists (lib.mapAttrsToList (name: map (def: def // { loc = loc ++ [ name ]; })) undeclared);
    };

  evalModules = { modules, specialArgs ? { }, prefix ? [ ], class ? null, args ? { } }@given:
    let
      own = {
        _file = "lib/modules.nix";
        key = "lib/modules.nix";
        options._module = {
          args = lib.mkOption { type = types.lazyAttrsOf types.raw; default = { }; internal = true; };
          check = lib.mkOption { type = types.bool; default = true; internal = true; };
        };
        config._module = { inherit args; };
      };

      # A function gets the arguments that it names; `config` and what `_module.args` has may come of this very call.
      call = file: function:
        let
          known = { inherit lib config options specialArgs; } // specialArgs;
          wanted = removeAttrs (lib.functionArgs function) (attrNames known);
          more = mapAttrs (name: _: addErrorContext "while evaluating the module argument `${name}' in `${file}':" config._module.args.${name}) wanted;
        in
        function (known // more);

      all' = collect call ([ own ] ++ modules);
      tree = mergeTree prefix
        (map (m: { inherit (m) file options; }) all')
        (concatMap (m: push prefix { inherit (m) file; value = m.config; }) all');
      options = tree.option;

      freeform = lib.findFirst (type: type != null) null (map (m: m.freeform) all');
      loose = mergeDefinitions prefix freeform
        (map (def: { inherit (def) file; value = lib.setAttrByPath (lib.drop (length prefix) def.loc) def.value; }) tree.unmatched);
      config = if freeform == null || tree.unmatched == [ ] then tree.value else lib.recursiveUpdate loose.value tree.value;

      stray = head tree.unmatched;
      checked =
        if freeform == null && tree.unmatched != [ ] && config._module.check then
          throw "The option `${showOption stray.loc}' does not exist. Definition values:${showDefs [ stray ]}"
        else removeAttrs config [ "_module" ];
    in
    {
      inherit options class;
      config = checked;
      _module = config._module // { inherit specialArgs; };
      extendModules = more: evalModules (given // {
        modules = modules ++ more.modules or [ ];
        specialArgs = specialArgs // more.specialArgs or { };
        prefix = more.prefix or prefix;
      });
    };
in
{
  inherit evalModules mergeDefinitions;
  pushDownProperties' = push;
  setDefaultModuleLocation = file: m: { _file = file; imports = [ m ]; };
}
