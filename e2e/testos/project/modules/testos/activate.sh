#!/bin/bash
# Makes @system@ the current system, as far as files go; units are switch-to-configuration's.
# As on NixOS, a step that fails is remembered and the rest still runs.
systemConfig=@system@
export PATH=/run/current-system/sw/bin:/usr/sbin:/usr/bin:/sbin:/bin
_status=0
trap '_status=1' ERR

# --- /etc: links through /etc/static, so that one rename moves all of them; copies where a mode was asked for
copied=/var/lib/testos/copied
mkdir -p /etc /var/lib/testos
ln -sfnT "$systemConfig/etc" /etc/static.new
mv -T /etc/static.new /etc/static
while read -r mode path; do
  mkdir -p "$(dirname "/etc/$path")"
  if [ "$mode" = symlink ]; then
    [ "$(readlink "/etc/$path")" = "/etc/static/$path" ] || { ln -sfn "/etc/static/$path" "/etc/$path.new" && mv -T "/etc/$path.new" "/etc/$path"; }
  else
    install -m "$mode" "/etc/static/$path" "/etc/$path.new" && mv -T "/etc/$path.new" "/etc/$path"
  fi
done <"$systemConfig/etc-files"
find /etc -xdev -type l -lname '/etc/static/*' ! -exec test -e {} \; -delete
# A copy has no link that shows whose it is, so the last activation's are on a list.
sed -n '/^symlink /!s/^[^ ]* //p' "$systemConfig/etc-files" >"$copied.new"
[ ! -e "$copied" ] || grep -v -x -F -f "$copied.new" "$copied" | while read -r path; do
  [ -L "/etc/$path" ] || rm -f "/etc/$path"
done
mv "$copied.new" "$copied"

# --- the configuration's own script
@script@

ln -sfnT "$systemConfig" /run/current-system
exit $_status
