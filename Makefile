# Every target makes what it needs, in a .venv of its own: nothing has to be installed by hand.
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
NAME ?= growing
REF ?= HEAD~1
KERNELS := src/protomamba/kernels
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PYTEST := $(BIN)/python -m pytest
# On every core: a test uses one, whatever the machine has.
PYTEST_ALL := $(PYTEST) -n auto
READY := $(VENV)/.ready
READY_PARITY := $(VENV)/.ready-parity
READY_STUDIES := $(VENV)/.ready-studies
READY_DOCS := $(VENV)/.ready-docs
READY_TRACKERS := $(VENV)/.ready-trackers
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
.PHONY: help setup demo demo-heads test test-trackers test-browser test-reference test-sanitize test-arm64 test-tsan \
	test-instructions test-reliability test-ranks test-wheel fuzz test-slow lint types check bench bench-compare parity decoding \
	levels speedrun digits study docs hooks wheel wheels sdist clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

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
	@$(PYTEST_ALL) $(ARGS)

test-reference: $(READY) ## the kernel tests once more, with the reference path forced
	@PROTOMAMBA_KERNELS=reference $(PYTEST_ALL) tests/kernels $(ARGS)

# Python is not built with the sanitizers, so their runtimes are loaded before it; libstdc++ with them, or the interceptor
# of C++ exceptions finds nothing to call. Leaks are not looked for: Python and torch keep memory until the end.
PRELOAD = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
test-sanitize: $(READY) ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer (Linux, GCC)
	@rm -rf $(SANITIZED)
	@$(PIP) --no-deps --target $(SANITIZED) --config-settings cmake.define.PROTOMAMBA_SANITIZE=address,undefined .
	@ls $(SANITIZED)/protomamba/kernels/libprotomamba_*
	@LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		PROTOMAMBA_LIBRARY_DIR=$(CURDIR)/$(SANITIZED)/protomamba/kernels $(PYTEST_ALL) tests/kernels $(ARGS)

# The kernel tests' cases and float64 answers, for the native runner (tests/native); written anew when the kernels change.
CASES := build/cases.bin
$(CASES): $(wildcard $(KERNELS)/csrc/* $(KERNELS)/*.py $(KERNELS)/reference/*.py tests/kernels/*.py tests/native/*.py) | $(READY)
	@$(BIN)/python -m tests.native.write_cases $@
	@command -v cmake >/dev/null || $(PIP) cmake

# build/$(1): the libraries and the runner by CMake with the options $(2).
native = PATH="$$PATH:$(CURDIR)/$(BIN)" && cmake -S . -B build/$(1) -DCMAKE_BUILD_TYPE=Release -DPROTOMAMBA_RUNNER=ON \
	$(2) >build/$(1).log && cmake --build build/$(1) --parallel 2 >>build/$(1).log || { cat build/$(1).log; exit 1; }

ARM64 := aarch64-linux-gnu
test-arm64: $(CASES) ## the kernel tests' cases on arm64 (NEON), cross-compiled and emulated (needs what it says)
	@for tool in $(ARM64)-g++ qemu-aarch64; do command -v $$tool >/dev/null || { echo "test-arm64: $$tool is missing;" \
		"on Debian and Ubuntu: apt-get install g++-$(ARM64) qemu-user"; exit 1; }; done
	@$(call native,arm64,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM64)-g++)
	@qemu-aarch64 -L /usr/$(ARM64) build/arm64/runner build/arm64/libprotomamba_baseline.so $(CASES)

test-tsan: $(CASES) ## the kernel tests' cases with four threads under ThreadSanitizer
	@$(call native,tsan,-DPROTOMAMBA_SANITIZE=thread)
	@TSAN_OPTIONS=halt_on_error=1 build/tsan/runner build/tsan/libprotomamba_baseline.so $(CASES) 4

REF ?= HEAD~1
test-instructions: $(READY) ## instructions of five ops at the AVX2 level beside another commit's, REF=HEAD~1 (needs valgrind)
	@command -v valgrind >/dev/null || { echo "test-instructions: valgrind is missing; on Debian and Ubuntu: apt-get" \
		"install valgrind"; exit 1; }
	@command -v cmake >/dev/null || $(PIP) cmake
	@PATH="$$PATH:$(CURDIR)/$(BIN)" $(BIN)/python -m tests.native.instructions $(REF)

test-reliability: $(READY) ## all reliability promises at full figures, and one table (a quarter of an hour)
	@$(BIN)/python -m tests.reliability $(ARGS)

fuzz: $(READY_PARITY) ## 100,000 hostile variants of every kind of file (hours); ARGS='--readers npy,checkpoint --count 1000'
	@$(BIN)/python -m tests.reliability.fuzz $(ARGS)

test-ranks: $(READY) ## several ranks: 200 random plans, kills, signals under torch's launcher (half an hour); KILLS=100
	@$(PYTEST) tests/distributed -m 'slow or not slow' $(ARGS)

test-slow: $(READY) ## every test that `make test` leaves out (long)
	@$(PYTEST) -m slow $(ARGS)

$(READY_TRACKERS): $(READY)
	@echo "installing tensorboard, trackio and wandb into $(VENV)"
	@$(PIP) $$($(BIN)/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"] \
		["optional-dependencies"]; print(*extras["tensorboard"], *extras["trackio"], *extras["wandb"])')
	@touch $@

test-trackers: $(READY_TRACKERS) ## runs in TensorBoard, trackio and Weights & Biases, offline (a minute or two)
	@$(PYTEST) -m slow tests/train/callbacks/test_trackers.py $(ARGS)

test-browser: $(READY) ## the report in headless Chromium, which must be installed; PROTOMAMBA_PICTURES=DIR keeps screenshots
	@$(PYTEST) -m slow tests/report/test_browser.py $(ARGS)

lint: $(READY) ## formatting and lint
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: $(READY) ## static types
	@$(BIN)/mypy

check: lint types ## lint and types

bench: $(READY) ## time steps against their matrix products and write docs/bench.md (about 10 minutes)
	@$(BIN)/protomamba bench --precision fp32,bf16 --sections steps,threads,lengths --threads 1 \
		--markdown docs/bench.md $(ARGS)

bench-compare: $(READY) ## time the step against another commit's, in turns: REF=HEAD~1 (some minutes)
	@$(BIN)/python -m protomamba.bench.compare $(REF) $(ARGS)

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

levels: $(READY) ## time single ops at every CPU level beside the level below (half a minute)
	@$(BIN)/python studies/levels.py $(ARGS)

speedrun: $(READY) ## seconds of one core to 1.90 and 1.80 bits a byte, beside a transformer and an LSTM (an hour)
	@$(BIN)/python studies/speedrun.py --docs-dir docs $(ARGS)

digits: $(READY_STUDIES) ## classify handwritten digits read as 64 steps, five-fold (a minute or two)
	@$(BIN)/python examples/digits.py $(ARGS)

study: $(READY_STUDIES) ## make a study of docs/ again: NAME=growing, local_updates, precision or prototypes (long)
	@$(BIN)/python studies/$(NAME).py $(ARGS)

$(READY_DOCS): $(READY)
	@echo "installing sphinx into $(VENV)"
	@$(PIP) -e '.[docs]'
	@touch $@

docs: $(READY_DOCS) ## the documentation site in build/docs; a link or reference that leads nowhere is an error
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs $(ARGS)
	@echo "build/docs/index.html"

hooks: $(READY) ## run formatting, lint, types and the house's rules before each commit
	@$(PIP) pre-commit && $(BIN)/pre-commit install

wheel: $(READY) ## dist/*.whl for this platform, for every Python
	@$(BIN)/python -m build --wheel

test-wheel: $(READY) ## wheel and sdist: what is in them, that they run, that two builds are the same bytes (a minute or two)
	@$(PYTEST) -m slow tests/test_packaging.py $(ARGS)

wheels: $(CASES) ## dist/*.whl for x86_64 and arm64 Linux with glibc 2.17 or newer, by zig's compiler, each tried (long)
	@$(PIP) ziglang auditwheel wheel
	@$(BIN)/python tools/wheels.py --cases $(CASES) $(ARGS)

sdist: $(READY) ## dist/*.tar.gz
	@$(BIN)/python -m build --sdist

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist $(LITTER) $(KERNELS)/*.so $(KERNELS)/*.dylib
