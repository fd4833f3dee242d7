# Every target makes what it needs, in a .venv of its own: nothing has to be installed by hand.
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
NAME ?= growing
KERNELS := src/protomamba/kernels
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PYTEST := $(BIN)/python -m pytest
READY := $(VENV)/.ready
READY_PARITY := $(VENV)/.ready-parity
READY_STUDIES := $(VENV)/.ready-studies
SANITIZED := build/sanitized
# CMake's own files: an editable build runs in the source folder (docs/decisions/004-editable-in-place.md).
LITTER := CMakeCache.txt CMakeFiles CMakeInit.txt cmake_install.cmake build.ninja .cmake .ninja_deps .ninja_log \
	.skbuild-info.json
# Left alone, the build takes the compiler that Python itself was built with, which need not be on this machine.
ifeq ($(origin CXX),default)
CXX := c++
endif
export CXX

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo demo-heads test test-reference test-sanitize test-reliability test-slow lint types check bench \
	parity decoding digits study wheel sdist clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and sys.executable + " is Python " + \
		sys.version.split()[0] + "; 3.11 or newer is needed: make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)

# Reinstalls only when what decides the installation has changed. The libraries go first: a build that fails falls back to
# the reference path (docs/decisions/004-editable-in-place.md), and libraries of older sources would hide that.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard $(KERNELS)/csrc/*) | $(BIN)/pip
	@echo "installing protomamba into $(VENV) (a minute or more the first time)"
	@rm -f $(KERNELS)/*.so $(KERNELS)/*.dylib
	@$(PIP) -e '.[dev]'
	@rm -rf $(LITTER)
	@ls $(KERNELS)/libprotomamba_* >/dev/null 2>&1 || echo "no native kernels were built, the slow reference path is" \
		"used; with a C++ compiler, this shows why: $(BIN)/pip install -v --no-deps -e ."
	@touch $@

setup: $(READY) ## make .venv and install protomamba into it

demo: $(READY) ## train on the standard library's sources and show what was learned (about 3 minutes)
	@$(BIN)/python -m protomamba.demo $(ARGS)

demo-heads: $(READY) ## the same with the softmax head beside it (about 5 minutes)
	@$(BIN)/python -m protomamba.demo --heads hpn,softmax $(ARGS)

test: $(READY) ## the default tests (a few minutes); ARGS='tests/model -x' chooses
	@$(PYTEST) $(ARGS)

test-reference: $(READY) ## the kernel tests once more, with the reference path forced
	@PROTOMAMBA_KERNELS=reference $(PYTEST) tests/kernels $(ARGS)

# Python is not built with the sanitizers, so their runtimes are loaded before it; libstdc++ with them, or the interceptor
# of C++ exceptions finds nothing to call. Leaks are not looked for: Python and torch keep memory until the end.
PRELOAD = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
test-sanitize: $(READY) ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer (Linux, GCC)
	@rm -rf $(SANITIZED)
	@$(PIP) --no-deps --target $(SANITIZED) -C cmake.define.PROTOMAMBA_SANITIZE=ON .
	@ls $(SANITIZED)/protomamba/kernels/libprotomamba_*
	@LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		PROTOMAMBA_LIBRARY_DIR=$(CURDIR)/$(SANITIZED)/protomamba/kernels $(PYTEST) tests/kernels $(ARGS)

test-reliability: $(READY) ## all reliability promises at full figures, and one table (a quarter of an hour)
	@$(BIN)/python -m tests.reliability $(ARGS)

test-slow: $(READY) ## every test that `make test` leaves out (long)
	@$(PYTEST) -m slow $(ARGS)

lint: $(READY) ## formatting and lint
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: $(READY) ## static types
	@$(BIN)/mypy

check: lint types ## lint and types

bench: $(READY) ## time steps against their matrix products and write docs/bench.md (about 10 minutes)
	@$(BIN)/protomamba bench --precision fp32,bf16 --sections steps,threads,lengths --threads 1 \
		--markdown docs/bench.md $(ARGS)

$(READY_PARITY): $(READY)
	@echo "installing jax and transformers into $(VENV)"
	@$(PIP) $$($(BIN)/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"] \
		["optional-dependencies"]; print(*extras["jax"], *extras["transformers"])')
	@touch $@

parity: $(READY_PARITY) ## compare with JAX, transformers, the reference kernels and a resumed run
	@mkdir -p runs && $(BIN)/protomamba parity all --report runs/parity.json $(ARGS)

$(READY_STUDIES): $(READY)
	@echo "installing scikit-learn, matplotlib and tokenizers into $(VENV)"
	@$(PIP) $$($(BIN)/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"] \
		["optional-dependencies"]; print(*extras["examples"], *extras["plots"], *extras["tokenizers"])')
	@touch $@

decoding: $(READY_PARITY) ## time decoding beside transformers with the same weights (half a minute); ARGS='--threads 2'
	@$(BIN)/python studies/decoding.py $(ARGS)

digits: $(READY_STUDIES) ## classify handwritten digits read as 64 steps, five-fold (a minute or two)
	@$(BIN)/python examples/digits.py $(ARGS)

study: $(READY_STUDIES) ## make a study of docs/ again: NAME=growing, local_updates, precision or prototypes (long)
	@$(BIN)/python studies/$(NAME).py $(ARGS)

wheel: $(READY) ## dist/*.whl for this platform, for every Python
	@$(BIN)/python -m build --wheel

sdist: $(READY) ## dist/*.tar.gz
	@$(BIN)/python -m build --sdist

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist $(LITTER) $(KERNELS)/*.so $(KERNELS)/*.dylib
