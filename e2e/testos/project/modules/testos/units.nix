# Turns `units` into the files of etc/systemd/system: one per unit, and a link per target that wants it.
{ units }:
let
  inherit (builtins) attrNames concatMap concatStringsSep filter isBool isList match;

  sections = {
    unit = "Unit"; service = "Service"; socket = "Socket"; timer = "Timer"; path = "Path"; mount = "Mount";
  };
  switches = [ "reloadIfChanged" "restartIfChanged" "stopIfChanged" ];
  known = attrNames sections ++ switches ++ [ "text" "wantedBy" "requiredBy" ];

  value = v: if isBool v then (if v then "true" else "false") else toString v;
  line = key: v: concatStringsSep "" (map (x: "${key}=${value x}\n") (if isList v then v else [ v ]));
  section = title: attrs: "[${title}]\n" + concatStringsSep "" (map (key: line key attrs.${key}) (attrNames attrs));

  # switch-to-configuration reads these back from the unit file, as NixOS's does.
  switchLines = unit: concatStringsSep "" (map
    (name: "X-${{ reloadIfChanged = "ReloadIfChanged"; restartIfChanged = "RestartIfChanged"; stopIfChanged = "StopIfChanged"; }.${name}}=${value unit.${name}}\n")
    (filter (name: unit ? ${name}) switches));

  render = name: unit:
    let
      unknown = filter (key: !(builtins.elem key known)) (attrNames unit);
      body = unit.text or (concatStringsSep "\n" (map (key: section sections.${key} unit.${key})
        (filter (key: unit ? ${key}) [ "unit" "service" "socket" "timer" "path" "mount" ])));
      extra = switchLines unit;
    in
    if unknown != [ ] then throw "testos: units.\"${name}\" has no option ${concatStringsSep ", " unknown}"
    else body + (if extra == "" then "" else "\n[Unit]\n" + extra);

  # What such a unit is nearly always wanted by; `wantedBy = [ ]` is for units that something else starts.
  usualTarget = name:
    if match ".*@\\..*" name != null then [ ]
    else if match ".*\\.service" name != null then [ "multi-user.target" ]
    else if match ".*\\.timer" name != null then [ "timers.target" ]
    else if match ".*\\.socket" name != null then [ "sockets.target" ]
    else [ ];
in
concatMap
  (name:
    let unit = units.${name}; in
    [{ path = "etc/systemd/system/${name}"; text = render name unit; }]
    ++ map (target: { path = "etc/systemd/system/${target}.wants/${name}"; link = "../${name}"; })
      (unit.wantedBy or (usualTarget name))
    ++ map (target: { path = "etc/systemd/system/${target}.requires/${name}"; link = "../${name}"; }) (unit.requiredBy or [ ]))
  (attrNames units)
