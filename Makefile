# One command each, on a fresh Debian 12 machine with git, make and python3 (as root, for the first installation):
#   make run     installs what is missing, builds, starts the pipeline of docs/examples/digits.yaml, asks it about a picture
#   make test    the same, and runs every test tier
MAKEFLAGS += --no-print-directory
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

JOBS ?= $(shell nproc)
PRESET ?= release
MANIFEST ?= docs/examples/digits.yaml
PICTURE ?= $(firstword $(wildcard docs/examples/digits/*.png))
QUESTION ?= Which digit is this?
CTEST_ARGS ?=

SITE = $$(cmake/deps.sh env | sed -n 's/^TORCH_SITE=//p')
ORACLE = $$(cmake/deps.sh env | sed -n 's/^ORACLE_PYTHON=//p')
KUBE = $$(cmake/deps.sh env | sed -n 's/^KUBE_BIN=//p')
HELM = $$(cmake/deps.sh env | sed -n 's/^HELM_BIN=//p')
configure = cmake --preset $(1) -DTORCH_SITE="$(SITE)" -DORACLE_PYTHON="$(ORACLE)" -DKUBE_BIN="$(KUBE)" -DHELM_BIN="$(HELM)" >build/$(1).log 2>&1 || { cat build/$(1).log; exit 1; }

.PHONY: help deps deps-test build run test build-sanitized build-fuzz bench bench-operator soak format clean
help:  ## this text
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps:
	@mkdir -p build
	@cmake/deps.sh apt rust dev

build: deps  ## compile everything (build/bin holds qwen-head, qwen-stage, qwenctl)
	@echo "[build] configuring"
	@$(call configure,$(PRESET))
	@echo "[build] compiling with $(JOBS) jobs"
	@cmake --build --preset $(PRESET) -j $(JOBS)

run: build  ## start the demo pipeline (1 head + 4 stages on the CPU) and ask it about a handwritten digit
	@build/bin/qwenctl run -f $(MANIFEST) --ask "$(QUESTION)" --image $(PICTURE)

deps-test: deps
	@cmake/deps.sh full oracle kube helm

build-sanitized: deps
	@echo "[build] head, engine and transport under ThreadSanitizer"
	@$(call configure,tsan)
	@cmake --build --preset tsan -j $(JOBS)

build-fuzz: deps
	@echo "[build] fuzz targets, and the torch-free rooms' unit tests, under AddressSanitizer and UndefinedBehaviorSanitizer (clang)"
	@$(call configure,fuzz)
	@cmake --build --preset fuzz -j $(JOBS)

test: deps-test build build-sanitized build-fuzz  ## unit, traces, parity against transformers, end to end, fuzz, sanitizers
	@ctest --test-dir build --output-on-failure -j $(JOBS) $(CTEST_ARGS)

bench: build  ## concurrency sweep of the demo pipeline: docs/benchmarks/cpu.json
	@tests/bench/run

bench-operator: deps-test build  ## 125 pipelines of 8 stages on 100 fake nodes, beside plain pods: docs/benchmarks/operator.json
	@KUBE_BIN="$(KUBE)" tests/bench/operator

SOAK_MINUTES ?= 30
soak: deps-test build  ## half an hour of random faults, after which the operator must hold what it held before: docs/benchmarks/operator_soak.json
	@KUBE_BIN="$(KUBE)" HELM_BIN="$(HELM)" tests/faults/soak.py build/bin/qwen-controller --minutes $(SOAK_MINUTES) --out docs/benchmarks

format:  ## clang-format in place
	@git ls-files '*.cc' '*.h' '*.cu' '*.cuh' | xargs clang-format -i

clean:  ## remove what was built (installed dependencies stay in the cache: cmake/deps.sh env)
	@rm -rf build
