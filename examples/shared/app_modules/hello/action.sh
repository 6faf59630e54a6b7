#!/usr/bin/env bash
# Actions of the app module hello, which run on a node as root:
#
#   nix-infra action NODE --app-module hello --cmd status
#   nix-infra action NODE --app-module hello --cmd rotate-token --save-as-secret hello.message --rotate
#   nix-infra action NODE --app-module hello --cmd fail
set -euo pipefail

usage="usage: status | rotate-token | fail"

case ${1:-} in
  status)
    # How the unit is, what it answers, and the digest of that: the answer may be a secret.
    environment=$(systemctl show hello.service --property=Environment --value)
    url=$(tr ' ' '\n' <<<"$environment" | sed -n 's/^HELLO_URL=//p')
    state=$(systemctl show hello.service --property=ActiveState --value)
    echo "unit: $state"
    [ "$state" = active ] || exit 1
    body=$(curl --fail --silent --show-error --max-time 5 "$url")
    echo "answers: yes"
    echo "sha256: $(printf %s "$body" | sha256sum | cut -d ' ' -f 1)"
    ;;
  rotate-token)
    # A new value, for --save-as-secret: then it goes, sealed, to who asked, and nowhere else.
    head -c 24 /dev/urandom | base64 | tr '+/' '-_'
    ;;
  fail)
    echo "failing, as asked" >&2
    exit 3
    ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
