# The test `hello`: the app answers with its secret, its actions work, and all of it goes again. Sourced by run-tests.sh.
# shellcheck shell=bash
node=${TEST_NODES%% *}
secret=hello.test-message

check() {
  local message status
  message="a message of $RANDOM$RANDOM"
  printf %s "$message" | nix_infra secrets store "$secret"
  deploy "$node" --test-dir "$TEST_DIR"

  status=$(nix_infra action "$node" --app-module hello --cmd status)
  assert_equal "the unit runs" active "$(field unit "$status")"
  assert_equal "it answers with the secret" "$(printf %s "$message" | digest)" "$(field sha256 "$status")"

  # What the action prints becomes the secret and is not shown; the node has it by the next deployment.
  nix_infra action "$node" --app-module hello --cmd rotate-token --save-as-secret "$secret" --force
  deploy "$node" --test-dir "$TEST_DIR"
  status=$(nix_infra action "$node" --app-module hello --cmd status)
  assert_equal "it answers with the new one" "$(nix_infra secrets show "$secret" | digest_line)" "$(field sha256 "$status")"

  assert_exit "an action that fails says so" 1 nix_infra action "$node" --app-module hello --cmd fail
  assert_equal "the unit still runs" active "$(nix_infra exec "$node" -- systemctl is-active hello.service)"
}

# digest_line is the digest of a line without its end.
digest_line() {
  local line
  IFS= read -r line || [ -n "$line" ]
  printf %s "$line" | digest
}

teardown() {
  deploy "$node"
  assert_equal "the unit is gone" inactive "$(nix_infra exec "$node" -- systemctl is-active hello.service || true)"
  nix_infra secrets rm "$secret"
}
