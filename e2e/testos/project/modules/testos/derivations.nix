# The few builders that testos needs, in place of nixpkgs' stdenv. Modules get them as `testos`.
{ system }:
let
  inherit (builtins) concatLists concatStringsSep genList length listToAttrs elemAt replaceStrings;

  shell = name: script: environment: derivation ({
    inherit name system;
    builder = "/bin/sh";
    args = [ "-euc" "export PATH=/usr/bin:/bin\n${script}" ];
  } // environment);
in
rec {
  # A shell-quoted word, for text that ends in a script.
  quote = text: "'" + replaceStrings [ "'" ] [ "'\\''" ] text + "'";

  # run NAME SCRIPT: a derivation that SCRIPT must make at $out.
  run = name: script: shell name script { };

  # writeScript NAME TEXT: an executable shell script in the store.
  writeScript = name: text: shell name ''
    { echo '#!/bin/sh'; cat "$textPath"; } >"$out"
    chmod 555 "$out"
  '' { inherit text; passAsFile = [ "text" ]; };

  writeText = name: text: shell name ''cp "$textPath" "$out"'' { inherit text; passAsFile = [ "text" ]; };

  # tree NAME FILES: a folder of { path, text } and { path, link }, in one derivation however many they are.
  tree = name: files:
    let
      keys = genList (i: "file${toString i}") (length files);
      named = genList (i: { name = elemAt keys i; value = (elemAt files i).text or (elemAt files i).link; }) (length files);
      step = i:
        let file = elemAt files i; target = quote file.path; in ''
          echo ${quote "installing ${file.path}"}
          mkdir -p "$out"/"$(dirname ${target})"
        '' + (if file ? link
        then ''ln -s "''$${elemAt keys i}" "$out"/${target}''
        else ''cp "''$${elemAt keys i}Path" "$out"/${target}'');
    in
    shell name (concatStringsSep "\n" ([ ''mkdir -p "$out"'' ] ++ genList step (length files)))
      (listToAttrs named // { passAsFile = concatLists (genList (i: if (elemAt files i) ? link then [ ] else [ (elemAt keys i) ]) (length files)); });
}
