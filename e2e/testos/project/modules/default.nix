# Shared modules of the fleet are imported here. testos itself is not one of them: the flake calls it.
{ ... }: { imports = [ ]; }
