# Builds the toplevel: the folder that a NixOS generation is, with the same names in it.
{ nodeName, nixVersion, system, testos, config }:
let
  inherit (builtins) attrNames concatStringsSep;

  # Flushing first makes the file the whole truth, so that loading an older one really goes back to it.
  ruleset = testos.writeText "firewall.nft" "flush ruleset\n${config.firewall}\n";

  units = {
    "firewall.service" = {
      unit.Description = "the node's firewall";
      service = {
        Type = "oneshot";
        RemainAfterExit = true;
        ExecStart = "/usr/sbin/nft -f ${ruleset}";
        ExecReload = "/usr/sbin/nft -f ${ruleset}";
      };
      reloadIfChanged = true;
    };
  } // config.units;

  etcNames = attrNames config.etc;
  isCopied = name: (config.etc.${name}.mode or "symlink") != "symlink";

  etc = testos.tree "etc" (
    import ./units.nix { inherit units; }
    ++ map (name: { path = "etc/${name}"; } // (if config.etc.${name} ? source then { link = "${config.etc.${name}.source}"; } else { inherit (config.etc.${name}) text; })) etcNames
    # What activation links and what it copies: "MODE PATH" a line.
    ++ [{
      path = "files";
      text = concatStringsSep "" (map
        (name: "${if isCopied name then config.etc.${name}.mode else "symlink"} ${name}\n")
        etcNames);
    }]
  );

  # The system's path. NixOS has its own tools there; testos passes Debian's on, which are the real ones too.
  tools = [
    "nix" "nix-build" "nix-collect-garbage" "nix-env" "nix-instantiate" "nix-store"
    "journalctl" "systemctl" "systemd-creds" "systemd-run" "ssh"
  ];
  sw = testos.run "system-path" ''
    mkdir -p "$out/bin"
    for tool in ${concatStringsSep " " tools}; do ln -s "/usr/bin/$tool" "$out/bin/$tool"; done
    for package in ${concatStringsSep " " config.packages}; do
      for program in "$package"/bin/*; do [ ! -e "$program" ] || ln -sf "$program" "$out/bin/"; done
    done
  '';

  # Derivations of their own, so that the links differ between two systems exactly when the kernel does.
  kernel = testos.run "linux-${config.kernel}" ''
    mkdir -p "$out/lib/modules/${config.kernel}"
    echo "linux ${config.kernel}" >"$out/bzImage"
  '';
  initrd = testos.run "initrd-${config.kernel}" ''
    mkdir "$out"
    echo "initrd ${config.kernel}" >"$out/initrd"
  '';

  extraBuild = testos.run "build-script" "${config.buildScript}\n: >>\"$out\"";
in
testos.run "nixos-system-${nodeName}-${nixVersion}" ''
  echo "building the system of ${nodeName}"
  mkdir -p "$out/bin"
  ${if config.buildScript == "" then "" else "ln -s ${extraBuild} \"$out/build-script\""}
  ln -s ${etc}/etc "$out/etc"
  ln -s ${etc}/files "$out/etc-files"
  ln -s ${sw} "$out/sw"
  ln -s ${kernel}/bzImage "$out/kernel"
  ln -s ${kernel} "$out/kernel-modules"
  ln -s ${initrd}/initrd "$out/initrd"
  printf %s "${nixVersion}.testos" >"$out/nixos-version"
  printf %s "${system}" >"$out/system"
  echo 1 >"$out/init-interface-version"
  cp ${./switch-to-configuration.sh} "$out/bin/switch-to-configuration"
  sed "s|@system@|$out|" ${./activate.sh} >"$out/activate"
  sed -i "/^@script@$/{
    r ${testos.writeText "activation-script" config.activationScript}
    d
  }" "$out/activate"
  chmod 555 "$out/activate" "$out/bin/switch-to-configuration"
  echo "built $out"
''
