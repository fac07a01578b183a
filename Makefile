# Two commands to begin with: `make demo` and `make test`. Each installs what it needs, and may be run again. A gateway
# that stays runs from an installation apart from this checkout: `make install`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Where nobody has set it (cloud-init, a unit of systemd's), that of the user.
export HOME := $(or $(HOME),$(shell echo ~))
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin:$(or $(CARGO_HOME),$(HOME)/.cargo)/bin

# The tests start the command hundreds of times, and without bytecode each would compile it anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
# Namespaces need root; where make is not run by root, those commands go through sudo.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo -E env "PATH=$$PATH")

FUZZ_SECONDS ?= 60
# Podman where both are there.
CONTAINER_ENGINE ?= $(firstword $(shell command -v podman docker))

.PHONY: help build install uninstall image demo guard test test-rust test-python check format bench fuzz mutants lock clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

build: ## .venv/bin/tidegate, and everything it needs
	@scripts/bootstrap all

install: ## /usr/local/bin/tidegate and its systemd units, apart from this checkout; again: an upgrade (root)
	@scripts/bootstrap wheel
	@$(AS_ROOT) scripts/install

uninstall: ## takes away what `install` installed; settings and state stay (root)
	@$(AS_ROOT) scripts/install --remove

image: ## `tidegate`, a container image, with podman or docker; docs/operation.md says how to run it (root)
	@$(AS_ROOT) $(or $(CONTAINER_ENGINE),$(error an image is built by podman or docker; on Debian: apt install podman)) \
	    build --file Containerfile --tag tidegate .

demo: build ## a client, the gateway and the internet on this machine, shown step by step (root)
	@$(AS_ROOT) $(VENV)/bin/tidegate demo

guard: build ## the instructions of the hot path against the committed figures (valgrind)
	@scripts/hot-path

test: test-rust test-python ## everything: Rust, Python, end to end in network namespaces (root)

test-rust: build
	cargo test --locked --workspace --lib --tests --example crowd --quiet

test-python: build
	$(AS_ROOT) $(VENV)/bin/pytest -m "not alone" -n 2 --dist loadgroup --no-loadscope-reorder
	$(AS_ROOT) $(VENV)/bin/pytest -m alone

check: build ## formatters, linters, types, the declared border against the built one, breakages that fit
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy src tests
	cargo fmt --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo clippy --locked -p tidegate-engine --lib --features python -- -D warnings
	$(VENV)/bin/stubtest tidegate._engine --mypy-config-file pyproject.toml
	$(VENV)/bin/python scripts/mutants --list >/dev/null

format: build ## writes what `check` wants to read
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	cargo fmt

bench: ## Tidegate beside the kernel, wireguard-go, boringtun, OpenVPN and SoftEther (root; 35 minutes)
	@scripts/bootstrap all --bench
	$(AS_ROOT) $(VENV)/bin/python -m tidegate.lab.bench --output docs/benchmark

fuzz: ## arbitrary bytes against every parser, FUZZ_SECONDS (60) each (fetches cargo-fuzz)
	@cargo fuzz --version >/dev/null 2>&1 || cargo install cargo-fuzz --locked || \
	    { echo "make fuzz needs cargo-fuzz, and could not install it: see above"; exit 1; }
	@scripts/fuzz --seconds $(FUZZ_SECONDS)

mutants: build ## breaks each behaviour of docs/nat.md once, and expects its tests to fail (root; some minutes)
	@$(AS_ROOT) $(VENV)/bin/python scripts/mutants

lock: build ## requirements*.lock anew, from pyproject.toml
	$(VENV)/bin/pip install --quiet pip-tools
	$(VENV)/bin/pip-compile --quiet --strip-extras --extra dev --generate-hashes --allow-unsafe \
	    --no-emit-find-links --no-emit-index-url --output-file requirements.lock pyproject.toml
	$(VENV)/bin/pip-compile --quiet --strip-extras --generate-hashes --allow-unsafe --constraint requirements.lock \
	    --no-emit-find-links --no-emit-index-url --output-file requirements-runtime.lock pyproject.toml
	$(VENV)/bin/pip-compile --quiet --strip-extras --extra dev --extra plot --generate-hashes --allow-unsafe \
	    --constraint requirements.lock --no-emit-find-links --no-emit-index-url --output-file requirements-bench.lock pyproject.toml

clean: ## what was built, and leftovers of killed labs (root: the tests run as root, and so leave files of root)
	-$(AS_ROOT) $(VENV)/bin/python -c 'from tidegate.lab.topology import remove_leftovers; remove_leftovers()'
	$(AS_ROOT) rm -rf target $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis src/tidegate/_engine*.so
	$(AS_ROOT) find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
