# Every target makes what it needs; the first one makes the environment. Nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
READY := $(VENV)/.ready
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

# Reinstalls only when what decides the installation has changed.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/protomamba/kernels/csrc/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing protomamba into $(VENV) (once; about a minute)"
	@$(PIP) -e '.[dev]'
	@touch $@

setup: $(READY) ## make .venv and install protomamba into it

demo: $(READY) ## train on the standard library's sources and show what was learned (about 5 minutes)
	@$(BIN)/python -m protomamba.demo

test: $(READY) ## the default tests (a few minutes)
	@$(BIN)/python -m pytest

lint: $(READY) ## formatting and lint
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: $(READY) ## static types
	@$(BIN)/mypy

check: lint types ## lint and types

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist src/protomamba/kernels/*.so src/protomamba/kernels/*.dylib
