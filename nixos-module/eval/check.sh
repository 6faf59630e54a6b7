#!/bin/sh
# Evaluates the modules with host.nix, which has to pass, and then with each line of cases.txt, which has to be refused for
# the reason that it says. NIXPKGS_LIB is the folder lib of nixpkgs; nothing else of it is needed, and nothing is built.
set -eu
cd "$(dirname "$0")"
: "${NIXPKGS_LIB:?set it to the folder lib of a checkout of nixpkgs}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

evaluate() { # MODULE...: the report as JSON, or an error
  modules=$(realpath ..)
  for m; do modules="$modules $(realpath "$m")"; done
  nix-instantiate --eval --strict --json eval.nix --arg libPath "$NIXPKGS_LIB" --arg modules "[ $modules ]"
}

evaluate host.nix > "$work/report" 2> "$work/err" || { cat "$work/err" >&2; exit 1; }
grep -qF '"failed":[],' "$work/report" || { echo "host.nix: failed assertions:"; cat "$work/report"; exit 1; }
grep -qF '"undocumented":[],' "$work/report" || { echo "options without a description:"; cat "$work/report"; exit 1; }

failed=0 n=0
while IFS= read -r line; do
  case $line in '#'*|'') continue ;; esac
  n=$((n + 1))
  body=${line%% ## *} want=${line##* ## }
  printf '{ lib, ... }: {\n%s\n}\n' "$body" > "$work/case.nix"
  evaluate base.nix "$work/case.nix" > "$work/report" 2> "$work/err" || true
  if ! cat "$work/report" "$work/err" | tr '\n' ' ' | grep -qF -- "$want"; then
    failed=$((failed + 1))
    echo "FAIL $body: wanted: $want"
    head -c 600 "$work/report"; grep error: "$work/err" || true
  fi
done < cases.txt
echo "$((n + 1)) passed, $failed failed" | awk -v f="$failed" '{ print $1 - f, "passed,", f, "failed" }'
[ "$failed" = 0 ]
