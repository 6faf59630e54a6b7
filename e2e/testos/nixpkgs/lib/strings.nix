# lib.strings
lib:
let
  inherit (builtins) concatStringsSep elemAt filter genList head isString length match replaceStrings split stringLength substring tail toString;
  upper = lib.stringToCharacters "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  lower = lib.stringToCharacters "abcdefghijklmnopqrstuvwxyz";
in
rec {
  inherit (builtins) concatStringsSep isString replaceStrings stringLength substring toJSON fromJSON;

  concatStrings = concatStringsSep "";
  concatMapStrings = f: list: concatStrings (map f list);
  concatMapStringsSep = separator: f: list: concatStringsSep separator (map f list);
  concatImapStrings = f: list: concatStrings (lib.imap1 f list);
  concatImapStringsSep = separator: f: list: concatStringsSep separator (lib.imap1 f list);
  concatMapAttrsStringSep = separator: f: attrs: concatStringsSep separator (lib.mapAttrsToList f attrs);
  concatLines = concatMapStrings (line: line + "\n");
  join = concatStringsSep;
  intersperse = separator: list: if length list < 2 then list else [ (head list) separator ] ++ intersperse separator (tail list);
  replicate = n: s: concatStrings (genList (_: s) n);

  optionalString = condition: s: if condition then s else "";
  hasPrefix = prefix: s: substring 0 (stringLength prefix) s == prefix;
  hasSuffix = suffix: s: let n = stringLength s - stringLength suffix; in n >= 0 && substring n (-1) s == suffix;
  hasInfix = infix: s: length (split (escapeRegex infix) "${s}") > 1;
  removePrefix = prefix: s: if hasPrefix prefix s then substring (stringLength prefix) (-1) s else s;
  removeSuffix = suffix: s: if hasSuffix suffix s then substring 0 (stringLength s - stringLength suffix) s else s;
  splitString = separator: s: filter isString (split (escapeRegex (toString separator)) (toString s));
  stringToCharacters = s: genList (i: substring i 1 s) (stringLength s);
  stringAsChars = f: s: concatStrings (map f (stringToCharacters s));
  toLower = replaceStrings upper lower;
  toUpper = replaceStrings lower upper;
  toSentenceCase = s: toUpper (substring 0 1 s) + toLower (substring 1 (-1) s);
  trim = s: let m = match "[ \t\r\n]*(.*[^ \t\r\n])[ \t\r\n]*" s; in if m == null then "" else head m;
  charToInt = c: lib.findFirstIndex (x: x == c) (throw "charToInt: '${c}' is not ASCII") ascii;
  fixedWidthString = width: filler: s: if stringLength s >= width then s else fixedWidthString width filler (filler + s);
  fixedWidthNumber = width: n: fixedWidthString width "0" (toString n);
  nameFromURL = url: separator: head (splitString separator (baseNameOf url));
  getExe' = package: program: "${lib.getBin package}/bin/${program}";
  getExe = package: getExe' package (package.meta.mainProgram or package.pname or (lib.getName package));
  isStringLike = x: isString x || builtins.isPath x || x ? outPath || x ? __toString;
  isConvertibleWithToString = x: isStringLike x || builtins.isInt x || builtins.isFloat x || builtins.isBool x || x == null || (builtins.isList x && builtins.all isConvertibleWithToString x);
  isStorePath = x: isStringLike x && dirOf (toString x) == builtins.storeDir;
  makeSearchPath = folder: packages: concatStringsSep ":" (map (p: "${p}/${folder}") (filter (x: x != null) packages));
  makeSearchPathOutput = _: makeSearchPath;
  makeBinPath = makeSearchPath "bin";
  makeLibraryPath = makeSearchPath "lib";

  escape = characters: replaceStrings characters (map (c: "\\" + c) characters);
  escapeRegex = escape [ "\\" "[" "{" "(" ")" "^" "$" "?" "*" "+" "|" "." "]" "}" ];
  escapeShellArg = x: let s = toString x; in if match "[[:alnum:],._+:@%/-]+" s != null then s else "'${replaceStrings [ "'" ] [ "'\\''" ] s}'";
  escapeShellArgs = concatMapStringsSep " " escapeShellArg;
  escapeNixString = s: escape [ "$" ] (builtins.toJSON s);
  escapeNixIdentifier = s: if match "[a-zA-Z_][a-zA-Z0-9_'-]*" s != null then s else escapeNixString s;
  escapeURL = s: stringAsChars (c: if match "[A-Za-z0-9_.~-]" c != null then c else "%" + fixedWidthString 2 "0" (lib.toHexString (charToInt c))) s;
  escapeXML = replaceStrings [ "\"" "'" "<" ">" "&" ] [ "&quot;" "&apos;" "&lt;" "&gt;" "&amp;" ];
  toShellVar = name: value:
    if builtins.isAttrs value && !lib.isDerivation value then "declare -A ${name}=(${concatStringsSep " " (lib.mapAttrsToList (n: v: "[${escapeShellArg n}]=${escapeShellArg v}") value)})"
    else if builtins.isList value then "declare -a ${name}=(${escapeShellArgs value})" else "${name}=${escapeShellArg value}";
  toShellVars = vars: concatStringsSep "\n" (lib.mapAttrsToList toShellVar vars);
  sanitizeDerivationName = s: stringAsChars (c: if match "[A-Za-z0-9+._?=-]" c != null then c else "-") (removePrefix "." (toString s));

  toIntBase10 = s: let m = match "[ \t\r\n]*(-?)0*([0-9]+)[ \t\r\n]*" s; in
    if m == null then throw "toInt: Could not convert ${escapeNixString s} to int." else builtins.fromJSON "${elemAt m 0}${elemAt m 1}";
  toInt = s:
    if match "[ \t\r\n]*-?0[0-9]+[ \t\r\n]*" s != null then throw "toInt: Ambiguity in interpretation of ${escapeNixString s} between octal and zero padded integer."
    else toIntBase10 s;
  versions = rec {
    splitVersion = builtins.splitVersion;
    major = v: elemAt (splitVersion v) 0;
    minor = v: elemAt (splitVersion v) 1;
    majorMinor = v: "${major v}.${minor v}";
  };

  # The characters with their codes: JSON knows them all.
  ascii = genList (n: if n == 0 then "" else builtins.fromJSON "\"\\u00${fixedWidthString 2 "0" (lib.toHexString n)}\"") 128;
  lowerChars = lower;
  upperChars = upper;
}
