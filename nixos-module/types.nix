# Types of the values that the agent's files have, as strict as the agent that reads them, so that a mistake is found
# before a system is built.
lib:
let
  inherit (lib) types;
  check = type: description: test: types.addCheck type test // { inherit description; };
  parts = path: lib.splitString "/" (lib.removePrefix "/" path);
  below = folder: path: path == folder || lib.hasPrefix "${folder}/" path;
in
rec {
  orNull = type: description: lib.mkOption {
    type = types.nullOr type;
    default = null;
    inherit description;
  };

  list = type: description: lib.mkOption {
    type = types.listOf type;
    default = [ ];
    inherit description;
  };

  # A role that may be the least that something needs.
  role = allowed: lib.mkOption {
    type = types.enum allowed;
    default = "operator";
    description = "The least role that is needed; each may do what the ones before it may.";
  };
  actors = [ "operator" "deployer" "admin" ];
  people = [ "viewer" ] ++ actors;

  # One line of 1 to most bytes.
  line = most: check types.str "one line of 1 to ${toString most} bytes"
    (s: s != "" && lib.stringLength s <= most && builtins.match "[^[:cntrl:]]*" s != null);

  pattern = line 512 // { description = "an RE2 expression of up to 512 bytes, which has to fit all of the value"; };

  account = types.strMatching "[a-z_][a-z0-9_-]*";

  folder = check types.str "an absolute path of a folder below /, without . and .. and without a / at its end"
    (s: lib.hasPrefix "/" s && lib.all (part: part != "" && part != "." && part != "..") (parts s));

  uploadFolder = check folder "an absolute path of a folder, not below /nix, /proc, /sys, /dev or /boot"
    (s: !lib.any (never: below never s) [ "/nix" "/proc" "/sys" "/dev" "/boot" ]);

  # A string, not a Nix path: that would be copied into the store.
  absolute = check types.str "an absolute path, as a string" (s: lib.hasPrefix "/" s && !lib.hasInfix "\n" s);

  # host:port, and with `all` also host:* for all ports.
  address = all:
    let
      split = builtins.match "(\\[[0-9a-f:.]+]|[a-z0-9]([a-z0-9.-]*[a-z0-9])?):([0-9]+|\\*)";
      port = s: let n = lib.toIntBase10 s; in lib.stringLength s <= 5 && 1 <= n && n <= 65535;
    in
    check types.str "host:port${lib.optionalString all " or host:*"}, the host an IP address (IPv6 in brackets) or a name in lower case"
      (s: let m = split s; in m != null && (if lib.elemAt m 2 == "*" then all else port (lib.elemAt m 2)));

  # What a document has of options: those that say something. Elements of lists stay, whatever they are.
  said = value:
    if lib.isAttrs value && !lib.isDerivation value
    then lib.filterAttrs (_: v: v != null && v != [ ] && v != { }) (lib.mapAttrs (_: said) value)
    else if lib.isList value then map said value
    else value;

  # Assertions about how long a list is, and how large a file.
  atMost = most: what: all: {
    assertion = lib.length all <= most;
    message = "services.nix-infra-agent.${what} has ${toString (lib.length all)} entries; ${toString most} are possible.";
  };
  fits = what: text: {
    assertion = lib.stringLength text <= 256 * 1024;
    message = "services.nix-infra-agent.${what} makes a file of ${toString (lib.stringLength text)} bytes; 262144 are possible.";
  };
}
