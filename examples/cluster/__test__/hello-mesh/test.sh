# The test `hello-mesh`: what runs on worker001 is reached on 127.0.0.1 of ingress001, and is gone from the mesh when its unit
# stops. The cluster's nodes have to be there (run-tests.sh create), with etcd001 and the certificates. Sourced by run-tests.sh.
# shellcheck shell=bash
key=/cluster/backends/hello/instances/worker001

check() {
  deploy worker001 ingress001 --test-dir "$TEST_DIR"
  assert_soon "worker001 is in the mesh" "$key" registered
  assert_soon "ingress001 reaches it" "hello from worker001" through_mesh
  nix_infra exec worker001 -- systemctl stop hello.service
  assert_soon "what stopped is not in the mesh" "" registered
  nix_infra exec worker001 -- systemctl start hello.service
  assert_soon "what started is" "$key" registered
}

registered() { nix_infra etcd --target etcd001 "get $key --keys-only"; }

through_mesh() {
  nix_infra port-forward ingress001 18080:127.0.0.1:8080 >/dev/null 2>&1 &
  local forward=$! answer
  answer=$(curl --silent --max-time 5 --retry 10 --retry-connrefused --retry-delay 1 http://127.0.0.1:18080/ || true)
  kill "$forward" 2>/dev/null || true
  wait "$forward" 2>/dev/null || true
  echo "$answer"
}

teardown() { deploy worker001 ingress001; }
