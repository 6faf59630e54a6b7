# infrastructure.hello = { enable = true; message = "…"; } runs a service that says so and stays.
{ config, testos, ... }:
let
  cfg = { enable = false; message = "hello"; } // (config.infrastructure.hello or { });
  program = testos.writeScript "hello" ''
    echo ${testos.quote cfg.message}
    exec sleep infinity
  '';
in
{
  units = if !cfg.enable then { } else {
    "hello.service" = {
      unit.Description = "says ${cfg.message}";
      service = { Type = "exec"; ExecStart = program; };
    };
  };
}
