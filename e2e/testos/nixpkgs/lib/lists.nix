# lib.lists
lib:
let
  inherit (builtins) concatLists concatMap elem elemAt filter foldl' genList head isList length tail;
in
rec {
  singleton = x: [ x ];
  toList = x: if isList x then x else [ x ];
  optional = condition: x: if condition then [ x ] else [ ];
  optionals = condition: list: if condition then list else [ ];
  foldr = f: end: list: let n = length list; go = i: if i == n then end else f (elemAt list i) (go (i + 1)); in go 0;
  fold = foldr;
  foldl = f: start: list: let go = i: if i < 0 then start else f (go (i - 1)) (elemAt list i); in go (length list - 1);
  forEach = list: f: map f list;
  flatten = x: if isList x then concatMap flatten x else [ x ];
  last = list: if list == [ ] then throw "lists.last: list must not be empty!" else elemAt list (length list - 1);
  init = list: if list == [ ] then throw "lists.init: list must not be empty!" else take (length list - 1) list;
  take = n: sublist 0 n;
  drop = n: list: sublist n (length list) list;
  takeEnd = n: list: drop (lib.max 0 (length list - n)) list;
  sublist = start: count: list: genList (i: elemAt list (start + i)) (lib.max 0 (lib.min count (length list - start)));
  range = first: last: if first > last then [ ] else genList (i: first + i) (last - first + 1);
  replicate = n: x: genList (_: x) n;
  reverseList = list: let n = length list; in genList (i: elemAt list (n - 1 - i)) n;
  imap0 = f: list: genList (i: f i (elemAt list i)) (length list);
  imap1 = f: list: genList (i: f (i + 1) (elemAt list i)) (length list);
  remove = x: filter (y: y != x);
  subtractLists = without: filter (x: !elem x without);
  intersectLists = with': filter (x: elem x with');
  mutuallyExclusive = a: b: intersectLists a b == [ ];
  unique = foldl' (seen: x: if elem x seen then seen else seen ++ [ x ]) [ ];
  uniqueStrings = list: builtins.attrNames (builtins.groupBy lib.id list);
  allUnique = list: length (unique list) == length list;
  count = test: list: length (filter test list);
  findFirst = test: default: list: let found = filter test list; in if found == [ ] then default else head found;
  findFirstIndex = test: default: list: let found = filter (i: test (elemAt list i)) (range 0 (length list - 1)); in if found == [ ] then default else head found;
  findSingle = test: none: many: list: let found = filter test list; in if found == [ ] then none else if length found > 1 then many else head found;
  sort = builtins.sort;
  sortOn = f: list: map (x: elemAt x 1) (sort (a: b: head a < head b) (map (x: [ (f x) x ]) list));
  naturalSort = sort (a: b: builtins.compareVersions a b < 0);
  zipListsWith = f: a: b: genList (i: f (elemAt a i) (elemAt b i)) (lib.min (length a) (length b));
  zipLists = zipListsWith (fst: snd: { inherit fst snd; });
  crossLists = f: foldl' (fs: args: concatMap (f': map f' args) fs) [ f ];
  mapCartesianProduct = f: sets: map f (lib.cartesianProduct sets);
  compareLists = cmp: a: b:
    if a == [ ] then (if b == [ ] then 0 else -1) else if b == [ ] then 1
    else let c = cmp (head a) (head b); in if c == 0 then compareLists cmp (tail a) (tail b) else c;
  groupBy' = op: start: f: list: lib.mapAttrs (_: foldl' op start) (builtins.groupBy f list);
  ifilter0 = test: list: concatLists (imap0 (i: x: optional (test i x) x) list);
}
