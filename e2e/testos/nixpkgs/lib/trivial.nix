# lib.trivial: functions about nothing in particular, and versions, paths and debugging.
lib:
let
  inherit (builtins) compareVersions isAttrs trace;
in
rec {
  id = x: x;
  const = x: _: x;
  pipe = builtins.foldl' (x: f: f x);
  flip = f: a: b: f b a;
  fix = f: let x = f x; in x;
  extends = overlay: f: final: let prev = f final; in prev // overlay final prev;
  composeExtensions = f: g: final: prev: let first = f final prev; in first // g final (prev // first);
  composeManyExtensions = lib.foldr composeExtensions (_: _: { });

  min = a: b: if a < b then a else b;
  max = a: b: if a > b then a else b;
  mod = a: b: a - b * (a / b);
  xor = a: b: a != b;
  boolToString = b: if b then "true" else "false";
  boolToYesNo = b: if b then "yes" else "no";
  mapNullable = f: x: if x == null then null else f x;
  defaultTo = default: x: if x == null then default else x;
  mergeAttrs = a: b: a // b;
  importJSON = path: builtins.fromJSON (builtins.readFile path);
  importTOML = path: builtins.fromTOML (builtins.readFile path);
  toFunction = x: if isFunction x then x else _: x;
  isFunction = f: builtins.isFunction f || (isAttrs f && f ? __functor);
  functionArgs = f: if f ? __functor then f.__functionArgs or (functionArgs (f.__functor f)) else builtins.functionArgs f;
  setFunctionArgs = f: args: { __functor = _: f; __functionArgs = args; };
  toHexString = n: if n < 16 then builtins.substring n 1 "0123456789ABCDEF" else toHexString (n / 16) + toHexString (mod n 16);

  versionOlder = a: b: compareVersions b a == 1;
  versionAtLeast = a: b: !versionOlder a b;
  getVersion = x: x.version or (builtins.parseDrvName (x.name or x)).version;
  getName = x: x.pname or (builtins.parseDrvName (x.name or x)).name;

  warn = message: trace "evaluation warning: ${message}";
  warnIf = condition: message: if condition then warn message else id;
  warnIfNot = condition: warnIf (!condition);
  throwIf = condition: message: if condition then throw message else id;
  throwIfNot = condition: throwIf (!condition);
  assertMsg = condition: message: condition || throw message;
  assertOneOf = name: value: values: assertMsg (builtins.elem value values) "${name} must be one of ${lib.generators.toPretty { } values}, but is ${lib.generators.toPretty { } value}";
  traceVal = x: trace x x;
  traceValSeq = x: builtins.deepSeq x (trace x x);
  isInOldestRelease = _: true;
  inPureEvalMode = !(builtins ? currentSystem);
}
