# The commands of the project; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X github.com/nix-infra/nix-infra/protocol.build=$(VERSION)
GOBUILD := CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)'

# Tests write many small files and wait until each is on the disk, and none is about a disk: in memory, where there is a
# lot of it, they take a fraction of the time. The programs of the tests are told so, and not go itself, which would build them there;
# GOTMPDIR goes before TMPDIR for what tests write since Go 1.26.
MEMORY := $(shell awk '$$2 == "/dev/shm" && $$3 == "tmpfs" && $$4 !~ /noexec/ { print $$2; exit }' /proc/mounts 2>/dev/null | \
  while read -r dir; do [ -w "$$dir" ] && [ "$$(df -k --output=avail "$$dir" | tail -n 1)" -gt 8000000 ] && echo "$$dir"; done)

# Packages whose tests need no root and no lab.
UNIT := ./protocol/... ./nix/... ./agent/... ./controller/... ./cli/... ./examples/... ./nixos-module/...

.PHONY: help build cross demo test test-unit test-lab soak lint bench clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## the three static programs, into bin/, and the names of the MCP servers
	$(GOBUILD) -o bin/nix-infra ./cli/nix-infra
	@for server in cluster machine dev; do ln -sfn nix-infra bin/nix-infra-$$server-mcp; done
	$(GOBUILD) -o bin/nix-infra-agent ./agent/nix-infra-agent
	$(GOBUILD) -o bin/nix-infra-controller ./controller/nix-infra-controller

cross: ## the CLI for macOS and arm64, agent and controller for arm64
	GOOS=darwin GOARCH=arm64 $(GOBUILD) -o bin/nix-infra-darwin-arm64 ./cli/nix-infra
	GOOS=darwin GOARCH=amd64 $(GOBUILD) -o bin/nix-infra-darwin-amd64 ./cli/nix-infra
	GOOS=linux GOARCH=arm64 $(GOBUILD) -o bin/nix-infra-linux-arm64 ./cli/nix-infra
	GOOS=linux GOARCH=arm64 $(GOBUILD) -o bin/nix-infra-agent-linux-arm64 ./agent/nix-infra-agent
	GOOS=linux GOARCH=arm64 $(GOBUILD) -o bin/nix-infra-controller-linux-arm64 ./controller/nix-infra-controller

demo: ## a controller, three nodes, two deploys and a rollback, on this machine (root; KEEP=1 leaves it running)
	@e2e/demo/demo

test: test-unit test-lab ## all tests: unit and integration with the race detector, then real nodes in the lab

test-unit:
	GORACE=atexit_sleep_ms=100 go test -race -timeout 15m $(if $(MEMORY),-exec 'env -u GOTMPDIR TMPDIR=$(MEMORY)') $(UNIT)
	go test -run '^TestSimulation$$' -v ./controller/rollout # all its fleets: with the race detector it takes a tenth of them

test-lab:
	$(if $(MEMORY),LAB_DIR=$${LAB_DIR:-$(MEMORY)/nix-infra-lab}) go test -p 1 -timeout 40m -v ./e2e/...

soak: ## every fuzzer for FUZZTIME (60s each), then the lab tests ten times over
	@set -e; for pkg in $$(go list $(UNIT)); do for f in $$(go test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	  echo "$$pkg $$f"; go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $${FUZZTIME:-60s} -fuzzminimizetime 10x $$pkg; done; done
	go test -timeout 6h -count 10 ./e2e

lint: ## gofmt, vet (for macOS too) and staticcheck
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo 'run gofmt -w on these'; exit 1; }
	go vet ./...
	GOOS=darwin go vet ./protocol/... ./cli/... ./e2e/...
	go tool staticcheck ./...

bench: ## benchmarks; SSH, questions to 100, 1,000 and 10,000 agents, an assistant's and deploys to 1,000 (SWARM="-deploys 0" for its flags); never fails on a time
	go test -run '^$$' -bench . -benchtime 3x $(UNIT)
	go run ./e2e/swarm $(SWARM)

clean: ## remove what was built, and labs that were left behind
	rm -rf bin
	@if [ "$$(id -u)" = 0 ] && [ "$$(uname)" = Linux ]; then e2e/lab/lab gc; $(if $(MEMORY),LAB_DIR=$(MEMORY)/nix-infra-lab e2e/lab/lab gc;) fi
