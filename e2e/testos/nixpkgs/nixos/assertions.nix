{ lib, ... }:
{
  options = {
    assertions = lib.mkOption {
      type = lib.types.listOf (lib.types.submodule { options = { assertion = lib.mkOption { type = lib.types.bool; }; message = lib.mkOption { type = lib.types.str; }; }; });
      default = [ ];
      description = "What has to be true of a configuration, or it is refused.";
    };
    warnings = lib.mkOption { type = lib.types.listOf lib.types.str; default = [ ]; description = "What is said when the system is evaluated."; };
    meta = lib.mkOption { type = lib.types.attrsOf lib.types.raw; default = { }; };
    lib = lib.mkOption { type = lib.types.attrsOf lib.types.attrs; default = { }; };
  };
}
