# lib.attrsets
lib:
let
  inherit (builtins) all attrNames attrValues concatMap elemAt filter foldl' head isAttrs isList length listToAttrs mapAttrs removeAttrs tail zipAttrsWith;
in
rec {
  nameValuePair = name: value: { inherit name value; };
  optionalAttrs = condition: attrs: if condition then attrs else { };
  mapAttrs' = f: attrs: listToAttrs (map (name: f name attrs.${name}) (attrNames attrs));
  mapAttrsToList = f: attrs: map (name: f name attrs.${name}) (attrNames attrs);
  attrsToList = mapAttrsToList nameValuePair;
  concatMapAttrs = f: attrs: foldl' (a: b: a // b) { } (mapAttrsToList f attrs);
  genAttrs = names: f: listToAttrs (map (name: nameValuePair name (f name)) names);
  genAttrs' = names: f: listToAttrs (map f names);
  filterAttrs = test: attrs: removeAttrs attrs (filter (name: !test name attrs.${name}) (attrNames attrs));
  foldAttrs = f: start: sets: mapAttrs (_: lib.foldr f start) (zipAttrsWith (_: values: values) sets);
  foldlAttrs = f: start: attrs: foldl' (acc: name: f acc name attrs.${name}) start (attrNames attrs);
  zipAttrs = zipAttrsWith (_: values: values);
  zipAttrsWithNames = names: f: sets: genAttrs names (name: f name (builtins.catAttrs name sets));
  getAttrs = names: attrs: genAttrs names (name: attrs.${name});
  mergeAttrsList = foldl' (a: b: a // b) { };
  cartesianProduct = sets: foldl' (rows: name: concatMap (row: map (value: row // { ${name} = value; }) sets.${name}) rows) [ { } ] (attrNames sets);

  attrByPath = path: default: set: if path == [ ] then set else if isAttrs set && set ? ${head path} then attrByPath (tail path) default set.${head path} else default;
  hasAttrByPath = path: set: path == [ ] || (isAttrs set && set ? ${head path} && hasAttrByPath (tail path) set.${head path});
  getAttrFromPath = path: attrByPath path (throw "cannot find attribute '${lib.concatStringsSep "." path}'");
  attrVals = names: set: map (name: set.${name}) names;
  setAttrByPath = path: value: lib.foldr (name: set: { ${name} = set; }) value path;
  updateManyAttrsByPath = updates: set: foldl' (s: u: recursiveUpdate' s (setAttrByPath u.path (u.update (attrByPath u.path null s))) u.path) set updates;
  recursiveUpdate' = old: new: path: if path == [ ] then new else old // { ${head path} = recursiveUpdate' (old.${head path} or { }) new.${head path} (tail path); };
  recursiveUpdateUntil = stop: a: b:
    let go = path: zipAttrsWith (name: values: let here = path ++ [ name ]; in
      if length values == 1 || stop here (elemAt values 0) (elemAt values 1) then lib.last values else go here values); in go [ ] [ a b ];
  recursiveUpdate = recursiveUpdateUntil (_: a: b: !(isAttrs a && isAttrs b));

  mapAttrsRecursiveCond = down: f: set:
    let go = path: mapAttrs (name: value: if isAttrs value && down value then go (path ++ [ name ]) value else f (path ++ [ name ]) value); in go [ ] set;
  mapAttrsRecursive = mapAttrsRecursiveCond (_: true);
  mapAttrsToListRecursive = f: set: collect (x: !isAttrs x) (mapAttrsRecursive f set);
  filterAttrsRecursive = test: set: mapAttrs (_: value: if isAttrs value then filterAttrsRecursive test value else value) (filterAttrs test set);
  collect = test: x: if test x then [ x ] else if isAttrs x then concatMap (collect test) (attrValues x) else [ ];
  matchAttrs = pattern: attrs: all (name: attrs ? ${name} && (if isAttrs pattern.${name} then isAttrs attrs.${name} && matchAttrs pattern.${name} attrs.${name} else pattern.${name} == attrs.${name})) (attrNames pattern);

  isDerivation = x: x.type or null == "derivation";
  getOutput = output: package: if isList package then package else package.${output} or package.out or package;
  getBin = getOutput "bin";
  getLib = getOutput "lib";
  getDev = getOutput "dev";
  getMan = getOutput "man";
  recurseIntoAttrs = attrs: attrs // { recurseForDerivations = true; };
  dontRecurseIntoAttrs = attrs: attrs // { recurseForDerivations = false; };
}
