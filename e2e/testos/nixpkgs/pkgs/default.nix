# pkgs: packages that are links to the programs of the Debian that the node is, and the builders that need no more than a
# shell. What would have to be compiled or fetched is an error that says so.
{ lib, system, overlays ? [ ], config ? { } }:
let
  # A derivation with what nixpkgs has beside its paths.
  package = { name ? "${pname}-${version}", pname ? lib.getName name, version ? lib.getVersion name, meta ? { }, passthru ? { } }: drv:
    let
      self = drv // {
        inherit name pname version passthru;
        meta = { description = ""; mainProgram = pname; } // meta;
        override = _: self;
        overrideAttrs = _: self;
      } // lib.genAttrs [ "out" "bin" "dev" "lib" "man" ] (_: self) // passthru;
    in
    self;

  shell = attrs: script: environment: package attrs (derivation ({
    name = attrs.name or "${attrs.pname}-${attrs.version}";
    inherit system;
    builder = "/bin/sh";
    args = [ "-euc" "export PATH=/usr/sbin:/usr/bin:/sbin:/bin\n${script}" ];
  } // environment));

  file = { name, text, executable ? false, destination ? "", mode ? if executable then "555" else "444", meta ? { }, passthru ? { } }:
    shell { inherit name meta passthru; } ''
      ${lib.optionalString (destination != "") ''mkdir -p "$out${dirOf destination}"''}
      cp "$textPath" "$out${destination}"
      chmod ${mode} "$out${destination}"
    '' { inherit text; passAsFile = [ "text" ]; };

  # The programs that a package of Debian's has, and more of them under names that its alternatives give them.
  debian = pname: { version, from ? pname, main ? pname, links ? { }, more ? "", passthru ? { } }:
    shell { inherit pname version passthru; meta.mainProgram = main; } ''
      list=/var/lib/dpkg/info/${from}.list
      [ -e "$list" ] || { echo "pkgs.${pname} is Debian's package ${from}, which this node has not got: LAB_PACKAGES=${from} brings it" >&2; exit 1; }
      mkdir -p "$out/bin"
      while read -r file; do
        case $file in
          /bin/*/* | /sbin/*/* | /usr/bin/*/* | /usr/sbin/*/*) ;;
          /bin/* | /sbin/* | /usr/bin/* | /usr/sbin/*) ln -sf "$file" "$out/bin/" ;;
        esac
      done <"$list"
      ${lib.concatStrings (lib.mapAttrsToList (name: target: "mkdir -p \"$out/${dirOf name}\" && ln -sf ${target} \"$out/${name}\"\n") links)}
      ${more}
    '' { };

  wants = names: lib.genAttrs names (name: throw "pkgs.${name}: the stand-in of nixpkgs compiles and fetches nothing");

  value = let t = lib.types.nullOr (lib.types.oneOf (with lib.types; [ bool int float str path (attrsOf t) (listOf t) ])) // { description = "value"; }; in t;
  format = type: toText: _: { inherit type; generate = name: v: pkgs.writeText name (toText v); };

  base = pkgs: lib.mapAttrs debian (import ./programs.nix) // {
    inherit lib system config pkgs;
    stdenv = {
      inherit system;
      shell = pkgs.runtimeShell;
      hostPlatform = { inherit system; isLinux = true; isDarwin = false; is64bit = true; isx86_64 = system == "x86_64-linux"; isAarch64 = system == "aarch64-linux"; };
      mkDerivation = throw "stdenv.mkDerivation: the stand-in of nixpkgs compiles nothing";
    };
    inherit (pkgs.stdenv) hostPlatform;
    runtimeShell = "${pkgs.bash}/bin/bash";
    linuxPackages = { kernel = { pname = "linux"; version = "6.12.0"; }; };
    linuxPackages_latest = pkgs.linuxPackages;

    callPackage = f: more: let g = if lib.isFunction f then f else import f; in g (builtins.intersectAttrs (lib.functionArgs g) pkgs // more);
    extend = overlay: import ./. { inherit lib system config; overlays = overlays ++ [ overlay ]; };

    # --- texts
    writeTextFile = file;
    writeText = name: text: file { inherit name text; };
    writeTextDir = path: text: file { name = baseNameOf path; inherit text; destination = "/${path}"; };
    writeScript = name: text: file { inherit name text; executable = true; };
    writeScriptBin = name: text: file { inherit name text; executable = true; destination = "/bin/${name}"; meta.mainProgram = name; };
    writeShellScript = name: text: pkgs.writeScript name "#!${pkgs.runtimeShell}\n${text}\n";
    writeShellScriptBin = name: text: pkgs.writeScriptBin name "#!${pkgs.runtimeShell}\n${text}\n";
    writeShellApplication = { name, text, runtimeInputs ? [ ], runtimeEnv ? { }, ... }: pkgs.writeShellScriptBin name ''
      set -o errexit -o nounset -o pipefail
      ${lib.toShellVars runtimeEnv}
      export PATH="${lib.makeBinPath runtimeInputs}:$PATH"
      ${text}
    '';

    # --- folders
    runCommand = name: environment: script: shell { inherit name; meta = environment.meta or { }; passthru = environment.passthru or { }; } script (removeAttrs environment [ "meta" "passthru" ]);
    runCommandLocal = pkgs.runCommand;
    symlinkJoin = { name, paths, postBuild ? "", meta ? { }, passthru ? { }, ... }: shell { inherit name meta passthru; } ''
      mkdir -p "$out"
      for path in $paths; do cp -rsf --no-preserve=mode "$path/." "$out/"; done
      ${postBuild}
    '' { inherit paths; };
    buildEnv = { name, paths, ... }: pkgs.symlinkJoin { inherit name paths; };
    linkFarm = name: entries: shell { inherit name; } (lib.concatMapStrings (e: ''
      mkdir -p "$out/$(dirname ${lib.escapeShellArg e.name})"
      ln -s ${lib.escapeShellArg "${e.path}"} "$out"/${lib.escapeShellArg e.name}
    '') (if lib.isAttrs entries then lib.mapAttrsToList (name: path: { inherit name path; }) entries else entries)) { };
    emptyDirectory = shell { name = "empty-directory"; } ''mkdir "$out"'' { };
    emptyFile = shell { name = "empty-file"; } '': >"$out"'' { };

    # A file that somebody has added to the store beforehand.
    requireFile = { name ? baseNameOf url, url ? null, hash ? null, sha256 ? null, hashMode ? "flat", message ? "${name} has to be added to the Nix store first" }:
      shell { inherit name; } ''echo ${lib.escapeShellArg message} >&2; exit 1'' {
        outputHashMode = hashMode;
        outputHash = if hash != null then hash else sha256;
        outputHashAlgo = if hash != null then null else "sha256";
      };

    formats = {
      json = format value builtins.toJSON;
      yaml = format value builtins.toJSON;
      ini = options: format (lib.types.attrsOf (lib.types.attrsOf value)) (lib.generators.toINI (removeAttrs options [ "type" ])) { };
      keyValue = options: format (lib.types.attrsOf value) (lib.generators.toKeyValue (removeAttrs options [ "type" ])) { };
    };

    # An image evaluates, and is not made.
    dockerTools = wants [ "pullImage" ] // lib.genAttrs [ "buildImage" "buildLayeredImage" "streamLayeredImage" ] (builder: { name, ... }:
      shell { name = "docker-image-${name}.tar.gz"; } ''echo "pkgs.dockerTools.${builder}: the stand-in of nixpkgs makes no images" >&2; exit 1'' { });
  } // wants [ "buildGoModule" "buildGo126Module" "buildNpmPackage" "fetchurl" "fetchzip" "fetchgit" "fetchFromGitHub" ];

  pkgs = lib.foldl' (prev: overlay: prev // overlay pkgs prev) (base pkgs) overlays;
in
pkgs
