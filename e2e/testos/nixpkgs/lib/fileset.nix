# lib.fileset, as far as it chooses what to import: a file set is a path here, or a list of them.
lib:
{
  maybeMissing = path: { files = lib.optional (builtins.pathExists path) path; };
  unions = sets: { files = lib.concatMap (set: set.files or [ set ]) sets; };
  toList = set: set.files or [ set ];
  toSource = { root, fileset }: throw "lib.fileset.toSource (of ${toString root}): the stand-in of nixpkgs builds no packages from source";
}
