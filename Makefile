# Every target sets the project up first: `make demo` on a fresh clone is enough.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= python3.11

# Two files at a time; a file's tests share their servers, so they stay together.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile

PIP_INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: help setup demo test test-all lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install everything (about 11 GB, some minutes; once)

# Done again only when what is to be installed has changed.
$(STAMP): setup.py platforms/torch_cpu/pyproject.toml
	@python=""; \
	for candidate in $(PYTHON) python3; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	[ -n "$$python" ] || { echo "Python 3.11 or newer is needed (python3 here: $$(python3 --version 2>&1)); name one: make PYTHON=..." >&2; exit 1; }; \
	echo "setting up $(VENV) with $$("$$python" --version): SGLang and PyTorch, about 11 GB, some minutes ..." >&2; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv $(VENV)
	@$(PIP_INSTALL) -e '.[dev]' -e platforms/torch_cpu
	@touch $@

demo: setup ## a chain of three agents, timed with and without relay
	@$(BIN)/python examples/quickstart.py

test: setup ## the tests, without the long runs
	@$(PYTEST) -m "not slow"

test-all: setup ## all tests
	@$(PYTEST)

lint: setup ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: setup ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
