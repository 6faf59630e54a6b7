#!/bin/bash
# Makes the system that this file is part of the running one, the boot default, or both, with NixOS's
# arguments, messages and exit codes: 0 done, 1 refused, 2 activation failed, 3 systemd could not reload,
# 4 units failed, 100 a reboot is needed. What must survive a kill lies in /run/nixos, as on NixOS.
set -u
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

top=$(dirname "$(dirname "$(readlink -f "$0")")")
action=${1-}
units=etc/systemd/system
say() { echo "$*" >&2; }

case $#:$action in
  1:switch | 1:boot | 1:test | 1:dry-activate | 1:check) ;;
  *)
    say "Usage: $0 [check|switch|boot|test|dry-activate]
check:        run pre-switch checks and exit
switch:       make the configuration the boot default and activate now
boot:         make the configuration the boot default
test:         activate the configuration, but don't make it the boot default
dry-activate: show what would be done if this configuration were activated"
    exit 1
    ;;
esac
[ -e /etc/NIXOS ] || { say "This is not a NixOS installation!"; exit 1; }

mkdir -p /run/nixos
exec {lock}>/run/nixos/switch-to-configuration.lock
flock -n "$lock" || { say "Could not acquire lock"; exit 1; }
[ "$action" != check ] || exit 0

# --- the boot default: the first line of defence, so written whole or not at all
install_bootloader() {
  local profile number
  say "updating the boot loader..."
  mkdir -p /boot/testos/entries || return
  rm -f /boot/testos/entries/*
  for profile in /nix/var/nix/profiles/system-*-link; do
    number=${profile##*/system-}
    [ ! -e "$profile" ] || echo "$(readlink -f "$profile")" >"/boot/testos/entries/generation-${number%-link}.conf" || return
  done
  ln -sfnT "$top" /boot/testos/default.new && mv -T /boot/testos/default.new /boot/testos/default && sync -f /boot/testos
}
if [ "$action" = switch ] || [ "$action" = boot ]; then
  install_bootloader || { say "Failed to install bootloader"; exit 1; }
fi
[ "$action" != boot ] || exit 0

old=$(readlink -f /run/current-system)
if [ "$(cat "$old/init-interface-version")" != "$(cat "$top/init-interface-version")" ]; then
  say "Warning: the new NixOS configuration has an 'init' that is incompatible with the current configuration; reboot to activate it."
  exit 100
fi

# --- what to do with each unit of the old system
declare -A active_before=() start=() restart=() reload=()
list_units() { systemctl list-units --all --full --plain --no-legend --no-pager; }
while read -r unit _ state _; do
  case $state in active | activating | reloading | refreshing) active_before[$unit]=1 ;; esac
done < <(list_units)
# Units that an earlier, interrupted run had stopped, or meant to change, are still owed.
read_list() { # FILE ARRAY
  local -n into=$2
  local unit
  [ ! -e "/run/nixos/$1" ] || while read -r unit; do [ ! -e "$top/$units/$unit" ] || into[$unit]=1; done <"/run/nixos/$1"
}
read_list start-list start
read_list restart-list restart
read_list reload-list reload

stop=() skip=()
flag() { grep -r -q -x "X-$2=$3" "$top/$units/$1" "$top/$units/$1.d" 2>/dev/null; }
# A unit's drop-ins; those of a unit that is none of the system's are Debian's unit's.
same_dropins() {
  [ ! -e "$old/$units/$1.d" ] && [ ! -e "$top/$units/$1.d" ] || diff -r -N -q "$old/$units/$1.d" "$top/$units/$1.d" >/dev/null
}
for dir in "$old/$units"/*.d "$top/$units"/*.d; do
  unit=${dir##*/}
  unit=${unit%.d}
  [ -d "$dir" ] && [ -n "${active_before[$unit]-}" ] && [ ! -e "$old/$units/$unit" ] && [ ! -e "$top/$units/$unit" ] || continue
  same_dropins "$unit" || flag "$unit" RestartIfChanged false || restart[$unit]=1
done
for file in "$old/$units"/*.*; do
  unit=${file##*/}
  [ -f "$file" ] && [ -n "${active_before[$unit]-}" ] || continue
  if [ ! -e "$top/$units/$unit" ]; then
    stop+=("$unit")
  elif cmp -s "$file" "$top/$units/$unit" && same_dropins "$unit"; then
    :
  elif flag "$unit" ReloadIfChanged true; then
    reload[$unit]=1
  elif flag "$unit" RestartIfChanged false; then
    skip+=("$unit")
  elif flag "$unit" StopIfChanged false; then
    restart[$unit]=1
  else
    stop+=("$unit")
    start[$unit]=1
  fi
done

join() { printf '%s\n' "$@" | LC_ALL=C sort | paste -sd, | sed 's/,/, /g'; }
tell() { # TEXT UNIT…: nothing when there are no units
  [ $# -lt 2 ] || say "$1 $(join "${@:2}")"
}
# Targets that already run are started again below, which starts whatever they newly want.
targets=() new=()
for wants in "$top/$units"/*.wants "$top/$units"/*.requires; do
  [ -d "$wants" ] || continue
  target=${wants##*/}
  target=${target%.*}
  [ -n "${active_before[$target]-}" ] || continue
  targets+=("$target")
  for link in "$wants"/*; do
    unit=${link##*/}
    [ -n "${active_before[$unit]-}${start[$unit]-}" ] || new+=("$unit")
  done
done

if [ "$action" = dry-activate ]; then
  tell "would stop the following units:" "${stop[@]}"
  tell "would NOT stop the following changed units:" "${skip[@]}"
  say "would activate the configuration..."
  tell "would reload the following units:" "${!reload[@]}"
  tell "would restart the following units:" "${!restart[@]}"
  tell "would start the following units:" "${!start[@]}" "${new[@]}"
  exit 0
fi

result=0
remember() { # FILE UNIT…
  local file=/run/nixos/$1
  shift
  [ $# = 0 ] || printf '%s\n' "$@" >"$file"
}
remember start-list "${!start[@]}"
remember restart-list "${!restart[@]}"
remember reload-list "${!reload[@]}"

# No child may inherit the lock: one that stays behind would keep every later switch out.
if [ ${#stop[@]} -gt 0 ]; then
  tell "stopping the following units:" "${stop[@]}"
  systemctl stop -- "${stop[@]}" {lock}>&-
fi
tell "NOT restarting the following changed units:" "${skip[@]}"

say "activating the configuration..."
NIXOS_ACTION=$action "$top/activate" {lock}>&- || result=2

systemctl reset-failed {lock}>&-
systemctl daemon-reload {lock}>&- || result=3

change() { # VERB LABEL UNIT…
  local verb=$1 label=$2
  shift 2
  [ $# -gt 0 ] || return 0
  tell "$label the following units:" "$@"
  systemctl "$verb" -- "$@" {lock}>&- || result=4
}
change reload reloading "${!reload[@]}"
rm -f /run/nixos/reload-list
change restart restarting "${!restart[@]}"
rm -f /run/nixos/restart-list
change start starting "${!start[@]}"
[ ${#targets[@]} = 0 ] || systemctl start -- "${targets[@]}" {lock}>&- || result=4
rm -f /run/nixos/start-list

# --- what came of it
failed=() started=()
while read -r unit _ state sub _; do
  case $state/$sub in
    failed/*) failed+=("$unit") ;;
    */auto-restart*)
      # Between two attempts it is neither failed nor running: the last exit says which it will be.
      [ "$(systemctl show --value -p ExecMainStatus -- "$unit")" = 0 ] || failed+=("$unit")
      ;;
    active/*)
      [ -n "${active_before[$unit]-}" ] || [ ! -e "$top/$units/$unit" ] || started+=("$unit")
      ;;
  esac
done < <(list_units)
tell "the following new units were started:" "${started[@]}"
if [ ${#failed[@]} -gt 0 ]; then
  say "warning: the following units failed: $(join "${failed[@]}")"
  systemctl status --no-pager --full --lines=5 -- "${failed[@]}" >&2
  result=4
fi
exit $result
