# The part of nixpkgs' lib that NixOS configurations use, under its names and with its meaning. modules.nix is where
# configurations are evaluated; options.nix and types.nix are what they are made of.
let
  # nixpkgs has these by their groups, and most of them beside those.
  groups = {
    trivial = import ./trivial.nix lib;
    lists = import ./lists.nix lib;
    strings = import ./strings.nix lib;
    attrsets = import ./attrsets.nix lib;
    options = import ./options.nix lib;
    modules = import ./modules.nix lib;
  };

  lib = groups // {
    inherit (builtins)
      add addErrorContext all any attrNames attrValues baseNameOf catAttrs compareVersions concatLists concatMap concatStringsSep
      deepSeq dirOf div elem elemAt filter foldl' fromJSON functionArgs genericClosure genList getAttr groupBy hasAttr
      hashString head intersectAttrs isAttrs isBool isFloat isFunction isInt isList isPath isString length lessThan listToAttrs
      map mapAttrs match mul parseDrvName partition pathExists readDir readFile removeAttrs replaceStrings seq split
      splitVersion stringLength sub substring tail toJSON toString trace tryEval typeOf zipAttrsWith ceil floor
      bitAnd bitOr bitXor;

    types = import ./types.nix lib;
    version = "25.11.testos";

    fileset = import ./fileset.nix lib;
    generators = import ./generators.nix lib;

    licenses = { mit.spdxId = "MIT"; asl20.spdxId = "Apache-2.0"; bsd3.spdxId = "BSD-3-Clause"; gpl3Only.spdxId = "GPL-3.0-only"; };
    maintainers = { };
    platforms = rec {
      linux = [ "x86_64-linux" "aarch64-linux" ];
      darwin = [ "x86_64-darwin" "aarch64-darwin" ];
      unix = linux ++ darwin;
      all = unix;
    };
    systems.flakeExposed = lib.platforms.all;
  } // groups.trivial // groups.lists // groups.strings // groups.attrsets // groups.options // groups.modules;
in
lib
