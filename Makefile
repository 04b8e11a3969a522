# Everything a contributor or CI runs. `make help` lists the targets; each sets up what it needs.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# PYTHON makes the virtual environment (3.11 or newer). TORCH is installed first, so that the build your package
# index offers is the one that stays; for another build (CUDA, ROCm) set TORCH or pip's own PIP_INDEX_URL.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up

# Two workers on two cores, at most eight anywhere; one thread each, so that they do not fight over the cores.
TEST_WORKERS ?= auto
PYTEST_ARGS ?=

.PHONY: help setup quickstart test test-fast check format docs-check wheel clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make the virtual environment .venv (again when pyproject.toml has changed)

$(STAMP): pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "no '$(PYTHON)' on the PATH; install Python 3.11 or newer, or run: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "clbench needs Python 3.11 or newer and '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1);" \
	       "run: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
	@echo "set up: $$($(BIN)/python -V) in $(VENV)"

quickstart: setup  ## prepare a stream, run three methods, show the leaderboard (minutes, no GPU)
	$(BIN)/clbench quickstart

# With a browser in place its tests must run; in CI they must run in any case, so that a broken set-up is red.
test: setup  ## run every test, setting up the browser first
	@if PATH="$(abspath $(BIN)):$$PATH" scripts/setup-browser; then export CLBENCH_REQUIRE_BROWSER=1; \
	elif [ -n "$${CI:-}" ]; then echo "make test: no browser in CI; its tests will fail" >&2; \
	  export CLBENCH_REQUIRE_BROWSER=1; \
	else echo "make test: no browser; its tests will be skipped" >&2; fi; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --maxprocesses 8 --dist worksteal \
	  --durations 15 $(PYTEST_ARGS)

test-fast: setup  ## run the tests that need neither a browser nor ten seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --maxprocesses 8 --dist worksteal \
	  -m 'not browser and not slow' $(PYTEST_ARGS)

check: setup  ## format, lint, types, house rules and documentation, as CI does
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_architecture.py tests/test_docs.py

format: setup  ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs-check: setup  ## check the documentation's links, commands and targets
	$(BIN)/python -m pytest --quiet tests/test_docs.py

wheel: setup  ## build dist/*.tar.gz and dist/*.whl
	rm -rf build dist ./*.egg-info
	$(BIN)/python -m build --no-isolation --outdir dist

clean:  ## remove what was built, not your runs and not .venv
	rm -rf build dist site ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
