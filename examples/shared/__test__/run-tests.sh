#!/usr/bin/env bash
# Tests of this project on real nodes: __test__/NAME has the node files of a test and its test.sh.
#
#   NIX_INFRA     the program, nix-infra without it
#   TEST_NODES    the nodes that tests run on, those in __test__/test-nodes without it
#   DEPLOY_FLAGS  more flags of nix-infra deploy, such as "--settle 1s"
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(dirname "$here")
TEST_NODES=${TEST_NODES:-$(cat "$here/test-nodes")}

usage="usage: __test__/run-tests.sh VERB [ARGUMENT]...

  create               make the test nodes, or bring them in
  run TEST...          deploy a test's configuration, check it, and take it away again (--no-teardown as the first: leave it)
  reset TEST...        take what a test left away
  status               whether the test nodes are as they should be
  update               deploy the project to them
  upgrade V            the same with another version of NixOS
  destroy              remove them
  ssh | cmd | action | port-forward ARGUMENT...    as nix-infra has them"

die() { echo "$1" >&2; exit 2; }
nix_infra() { "${NIX_INFRA:-nix-infra}" -d "$project" "$@"; }
# shellcheck disable=SC2086 # several flags are several words
deploy() { nix_infra deploy ${DEPLOY_FLAGS:-} "$@"; }

# What follows is for test.sh files.

fail() { echo "FAILED: $1" >&2; exit 1; }

assert_equal() { # WHAT WANT GOT
  [ "$2" = "$3" ] || fail "$1: wanted '$2', got '$3'"
  echo "ok: $1"
}

assert_exit() { # WHAT STATUS COMMAND...
  local what=$1 want=$2 got=0
  shift 2
  "$@" >/dev/null 2>&1 || got=$?
  assert_equal "$what" "$want" "$got"
}

assert_soon() { # WHAT WANT COMMAND...: within a minute
  local what=$1 want=$2 got=
  shift 2
  for _ in $(seq 30); do
    got=$("$@" | tr -d '[:space:]' || true)
    [ "$got" != "$(tr -d '[:space:]' <<<"$want")" ] || { echo "ok: $what"; return; }
    sleep 2
  done
  fail "$what: wanted '$want', got '$got'"
}

field() { # NAME TEXT: the value of a line "NAME: value"
  sed -n "s/^$1: //p" <<<"$2"
}

digest() { # of stdin
  if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -d ' ' -f 1
}

# one runs a part of a test, in a process of its own: what fails there ends it.
one() { # TEST PART
  TEST_DIR="__test__/$1"
  # shellcheck source=/dev/null
  source "$project/$TEST_DIR/test.sh"
  "$2"
}

tests() { # TEST...: whether there are such
  [ $# -ge 1 ] || die "$usage"
  for t in "$@"; do
    [ -f "$here/$t/test.sh" ] || die "there is no test $t; there are: $(cd "$here" && echo */test.sh | sed 's,/test.sh,,g')"
  done
}

each() { # PART TEST...
  local part=$1 failed=()
  shift
  for t in "$@"; do
    echo "== $t: $part"
    bash "$here/run-tests.sh" one "$t" "$part" || failed+=("$t")
  done
  [ ${#failed[@]} -eq 0 ] || { echo "FAILED: ${failed[*]}" >&2; return 1; }
}

[ $# -ge 1 ] || die "$usage"
verb=$1
shift
case $verb in
  create) nix_infra provision --batch --node-names="$TEST_NODES" ;;
  run)
    keep=
    [ "${1:-}" != --no-teardown ] || { keep=1; shift; }
    tests "$@"
    status=0
    each check "$@" || status=$?
    [ -n "$keep" ] || each teardown "$@" || status=$?
    [ $status -ne 0 ] || echo "passed: $*"
    exit $status
    ;;
  reset) tests "$@"; each teardown "$@" ;;
  one) one "$@" ;;
  status)
    for node in $TEST_NODES; do
      assert_equal "$node answers" 0 "$(nix_infra ping "$node" >/dev/null && echo 0 || echo $?)"
      assert_equal "$node has no failed units" "" "$(nix_infra exec "$node" -- systemctl list-units --failed --plain --no-legend)"
    done
    ;;
  # shellcheck disable=SC2086 # several names are several words
  update) deploy $TEST_NODES ;;
  # shellcheck disable=SC2086
  upgrade) [ $# -eq 1 ] || die "$usage"; nix_infra upgrade-nixos --nixos-version="$1" $TEST_NODES ;;
  destroy) nix_infra destroy --batch --target="$TEST_NODES" ;;
  ssh | cmd | action | port-forward) nix_infra "$verb" "$@" ;;
  *) die "$usage" ;;
esac
