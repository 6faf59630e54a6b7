# What nixpkgs' lib does, for the stand-in's to be held against: the names of the cases in which libPath's does otherwise.
#   nix-instantiate --eval --strict --json e2e/testos/testdata/lib.nix --argstr libPath LIB
{ libPath }:
let
  lib = import (/. + libPath);
  inherit (lib) mkOption types mkIf mkMerge mkDefault mkForce mkBefore mkAfter mkOrder mkOverride;

  option = type: mkOption { inherit type; };
  eval = modules: (lib.evalModules { inherit modules; }).config;
  # The value of an option x of this type with these definitions.
  value = type: defs: (eval ([ { options.x = option type; } ] ++ map (x: { inherit x; }) defs)).x;
  fails = x: !(builtins.tryEval (builtins.deepSeq x x)).success;
  refused = type: x: fails (value type [ x ]);
  taken = type: x: value type [ x ] == x;

  cases = {
    # --- priorities, conditions, order
    defaultLoses = value types.int [ (mkDefault 1) 2 ] == 2;
    forceWins = value types.int [ (mkForce 1) 2 ] == 1;
    lowestWins = value types.int [ (mkOverride 900 3) (mkDefault 1) ] == 3;
    optionDefaultIsLast = (eval [ { options.x = mkOption { default = 1; }; } { x = mkDefault 2; } ]).x == 2;
    anOverriddenErrorIsNone = (eval [ { options.x = mkOption { default = throw "never"; }; } { x = mkForce 2; } { x = mkDefault (throw "never"); } ]).x == 2;
    equalValuesAgree = value types.str [ "a" "a" ] == "a";
    unequalValuesConflict = fails (value types.str [ "a" "b" ]);
    falseIsNoDefinition = value types.int [ (mkIf false (throw "never")) 2 ] == 2;
    noDefinition = fails (value types.int [ (mkIf false 1) ]);
    mergesAndConditionsNest = value (types.listOf types.int) [ (mkMerge [ [ 1 ] (mkIf true (mkMerge [ [ 2 ] ])) ]) ] == [ 1 2 ];
    laterModulesComeFirst = value (types.listOf types.int) [ [ 1 ] [ 2 ] ] == [ 2 1 ];
    ordered = value (types.listOf types.int) [ (mkAfter [ 3 ]) [ 2 ] (mkBefore [ 1 ]) (mkOrder 2000 [ 4 ]) ] == [ 1 2 3 4 ];
    conditionsOfSets = (eval [ { options.a.b = option types.int; options.a.c = mkOption { default = 0; }; } { a = mkIf true { b = 1; c = mkIf false 5; }; } ]).a == { b = 1; c = 0; };
    prioritiesOfSets = (eval [ { options.a.b = option types.int; } { a = mkForce { b = 1; }; } { a.b = 2; } ]).a.b == 1;

    # --- modules
    importedOnce = (eval [ { options.x = option types.lines; imports = [ { key = "k"; x = "a"; } { key = "k"; x = "a"; } ]; } ]).x == "a";
    argumentsOfModules = (eval [ ({ config, lib, foo, ... }: { options.x = mkOption { default = foo + config.y; }; options.y = mkOption { default = 2; }; }) { _module.args.foo = 1; } ]).x == 3;
    unknownOption = fails (eval [ { options.x = mkOption { default = 1; }; } { y = 1; } ]);
    unknownOptionInAFalseCondition = fails (eval [ { options.x = mkOption { default = 1; }; } (mkIf false { y = 1; }) ]);
    mixedModule = fails (eval [ { options.x = mkOption { default = 1; }; x = 1; } ]);
    declaredTwice = (eval [ { options.x = option types.int; } { options.x = mkOption { type = types.int; default = 1; }; } ]).x == 1;
    declaredOtherwise = fails (eval [ { options.x = option types.int; } { options.x = option types.str; } { x = 1; } ]).x;
    freeform = (eval [ { freeformType = types.attrsOf types.int; options.x = mkOption { default = 1; }; } { y = 2; } ]) == { x = 1; y = 2; };
    freeformIsTyped = fails (eval [ { freeformType = types.attrsOf types.int; } { y = "2"; } ]).y;
    readOnlyTwice = fails (eval [ { options.x = mkOption { readOnly = true; }; } { x = 1; } { x = 2; } ]).x;
    applied = (eval [ { options.x = mkOption { apply = x: x + 1; }; } { x = 1; } ]).x == 2;
    isDefined = let o = (lib.evalModules { modules = [ { options.x = mkOption { }; options.y = mkOption { default = 1; }; } ]; }).options; in !o.x.isDefined && o.y.isDefined;
    whereItIsDefined = (lib.evalModules { modules = [ { options.x = option types.int; } { _file = "here"; x = 1; } ]; }).options.x.files == [ "here" ];
    extended = ((lib.evalModules { modules = [ { options.x = option types.int; } ]; }).extendModules { modules = [ { x = 4; } ]; }).config.x == 4;

    # --- types
    bool = taken types.bool true && refused types.bool 1;
    ints = taken (types.ints.between 1 3) 3 && refused (types.ints.between 1 3) 4 && refused types.ints.positive 0 && refused types.ints.unsigned (-1) && refused types.int 1.5;
    port = taken types.port 65535 && refused types.port 65536 && refused types.port "80";
    strings = taken types.nonEmptyStr "a" && refused types.nonEmptyStr " " && refused types.singleLineStr "a\nb" && refused (types.strMatching "[a-z]+") "a1" && taken (types.strMatching "[a-z]+") "a";
    lines = value types.lines [ "b" "a" ] == "a\nb" && value types.commas [ "b" "a" ] == "a,b";
    path = taken types.path "/a" && refused types.path "a" && refused types.path 1;
    package = refused types.package "/a" && refused types.package { };
    enum = taken (types.enum [ 1 "a" ]) "a" && refused (types.enum [ 1 "a" ]) "b";
    nullOr = taken (types.nullOr types.int) null && refused (types.nullOr types.int) "a" && fails (value (types.nullOr types.int) [ null 1 ]);
    either = taken (types.either types.int types.str) "a" && refused (types.either types.int types.str) true && value (types.oneOf [ types.int (types.listOf types.int) ]) [ [ 2 ] [ 1 ] ] == [ 1 2 ];
    lists = refused (types.listOf types.int) [ "a" ] && refused (types.nonEmptyListOf types.int) [ ] && value (types.listOf types.int) [ [ 1 (mkIf false 2) 3 ] ] == [ 1 3 ];
    emptyLists = value (types.listOf types.int) [ ] == [ ] && value (types.attrsOf types.int) [ ] == { };
    sets = value (types.attrsOf types.int) [ { a = 1; } { b = 2; } { a = mkForce 3; c = mkIf false 4; } ] == { a = 3; b = 2; };
    setsOfSets = value (types.attrsOf (types.attrsOf types.lines)) [ { a.b = "2"; } { a = { b = "1"; c = "3"; }; } ] == { a = { b = "1\n2"; c = "3"; }; };
    lazySets = value (types.lazyAttrsOf types.int) [ { a = 1; b = throw "never"; } ] ? b;
    anything = value types.anything [ { a.b = 1; } { a.c = [ 1 ]; } ] == { a = { b = 1; c = [ 1 ]; }; };
    raw = fails (value types.raw [ 1 1 ]);
    added = refused (types.addCheck types.int (x: x > 1)) 1 && taken (types.addCheck types.int (x: x > 1)) 2;
    coerced = value (types.coercedTo types.int toString types.str) [ 3 ] == "3" && refused (types.coercedTo types.int toString types.str) true;
    submodules =
      let type = types.attrsOf (types.submodule ({ name, config, ... }: { options = { n = mkOption { default = name; }; double = mkOption { default = config.v * 2; }; v = option types.int; }; })); in
      value type [ { a.v = 1; } { a.n = "z"; b.v = 3; } ] == { a = { n = "z"; v = 1; double = 2; }; b = { n = "b"; v = 3; double = 6; }; }
      && fails (value type [ { a = { v = 1; w = 1; }; } ]) && fails (value type [ { a = { }; } ]);
    submoduleSettings = value (types.submodule { freeformType = types.attrsOf types.int; options.x = mkOption { default = 1; }; }) [ { y = 2; } { x = 3; } ] == { x = 3; y = 2; };
    functions = (value (types.functionTo types.int) [ (x: x + 1) ]) 1 == 2;

    # --- functions
    strings' = lib.splitString "." "a.b..c" == [ "a" "b" "" "c" ] && lib.removeSuffix ".x" "a.x" == "a" && lib.hasInfix "(b" "a(b)" && !lib.hasSuffix "abc" "c"
      && lib.toIntBase10 "007" == 7 && lib.toInt "-3" == -3 && fails (lib.toInt "007") && fails (lib.toInt "1a") && lib.concatMapStringsSep "," toString [ 1 2 ] == "1,2" && lib.toUpper "aé" == "Aé" && lib.trim "  a b " == "a b";
    escapes = lib.escapeShellArg "a'b c" == "'a'\\''b c'" && lib.escapeShellArg "a/b-1" == "a/b-1" && lib.escapeShellArg "" == "''" && lib.strings.escapeNixString "\"\${" == "\"\\\"\\\${\"" && lib.escapeURL "a b/" == "a%20b%2F";
    arguments = lib.escapeShellArgs [ "a" "b c" ] == "a 'b c'";
    lists' = lib.unique [ 1 2 1 ] == [ 1 2 ] && lib.subtractLists [ 1 ] [ 1 2 1 ] == [ 2 ] && lib.range 2 4 == [ 2 3 4 ] && lib.last [ 1 2 ] == 2 && lib.init [ 1 2 ] == [ 1 ] && lib.flatten [ 1 [ 2 [ 3 ] ] ] == [ 1 2 3 ]
      && lib.imap1 (i: x: i * x) [ 1 2 ] == [ 1 4 ] && lib.foldr (a: b: a - b) 0 [ 1 2 3 ] == 2 && lib.take 5 [ 1 ] == [ 1 ] && lib.drop 1 [ 1 2 ] == [ 2 ] && lib.reverseList [ 1 2 ] == [ 2 1 ] && lib.sortOn (x: -x) [ 1 3 2 ] == [ 3 2 1 ]
      && lib.findFirst (x: x > 1) null [ 1 2 3 ] == 2 && lib.zipLists [ 1 ] [ 2 3 ] == [ { fst = 1; snd = 2; } ];
    sets' = lib.recursiveUpdate { a.b = 1; a.c = 2; } { a.b = 3; } == { a = { b = 3; c = 2; }; } && lib.filterAttrs (_: v: v > 1) { a = 1; b = 2; } == { b = 2; } && lib.mapAttrs' (n: v: lib.nameValuePair "x${n}" v) { a = 1; } == { xa = 1; }
      && lib.attrByPath [ "a" "b" ] 0 { a.b = 1; } == 1 && lib.attrByPath [ "a" "c" ] 0 { a.b = 1; } == 0 && lib.genAttrs [ "a" ] (n: n) == { a = "a"; } && lib.foldAttrs (a: b: a + b) 0 [ { x = 1; } { x = 2; } ] == { x = 3; }
      && lib.cartesianProduct { a = [ 1 2 ]; b = [ 3 ]; } == [ { a = 1; b = 3; } { a = 2; b = 3; } ] && lib.collect builtins.isInt { a = 1; b.c = 2; } == [ 1 2 ] && lib.mapAttrsRecursive (p: v: lib.concatStringsSep "." p) { a.b = 1; } == { a.b = "a.b"; };
    versions = lib.versionAtLeast "2.10" "2.9" && lib.versionOlder "24.11" "25.05" && lib.versions.majorMinor "1.2.3" == "1.2";
    generators = lib.generators.toINI { } { a.b = 1; c.d = true; } == "[a]\nb=1\n\n[c]\nd=true\n" && lib.generators.toKeyValue { } { a = "b"; } == "a=b\n" && lib.generators.toJSON { } [ 1 ] == "[1]";
    executables = lib.getExe { outPath = "/x"; type = "derivation"; name = "a-1"; meta.mainProgram = "b"; } == "/x/bin/b" && lib.getExe' { outPath = "/x"; type = "derivation"; name = "a"; } "c" == "/x/bin/c" && lib.makeBinPath [ "/x" "/y" ] == "/x/bin:/y/bin";
    showOption = lib.showOption [ "a" "b c" "*" "<name>" ] == "a.\"b c\".*.<name>";
    files = lib.fileset.toList (lib.fileset.maybeMissing ./nothing) == [ ] && lib.fileset.toList (lib.fileset.maybeMissing ./lib.nix) == [ ./lib.nix ];
  };
in
builtins.filter (name: cases.${name} != true) (builtins.attrNames cases)
