# Two commands matter on a fresh machine: `make demo` and `make test`.
# On Linux the registry's torch carries CUDA; a machine without a GPU saves gigabytes with
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
WORKERS ?= 2
FINDS_PYTHON := for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done
PYTHON ?= $(shell $(FINDS_PYTHON))
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

# Idle OpenMP threads must sleep: see src/rankine/threads.py.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test test-fast test-latest test-oldest test-pinned wheel check format docs claims bench
.DEFAULT_GOAL := help

help:
	@echo "make demo     compress the embedded model with three methods; writes out/demo/report.html"
	@echo "make test     the whole test suite, with $(WORKERS) workers"
	@echo "make test-fast     without the slow ones"
	@echo "make test-latest   the suite with the newest release of everything but torch"
	@echo "make test-oldest   the suite with the oldest transformers that we promise to work with"
	@echo "make wheel    dist/rankine-*.whl"
	@echo "make setup    $(VENV) with everything that tests and checks need"
	@echo "make check    style, types, import contract, generated files"
	@echo "make format   reformat"
	@echo "make docs     regenerate catalogue, tables and command-line reference"
	@echo "make claims   re-measure the published claims (SYSTEM=auto for one, FULL=1 in full)"
	@echo "make bench    speed of the kernels on this machine"

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "expected Python 3.11 or newer, found none: install it, or set PYTHON=" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runs: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing rankine into $(VENV)" >&2
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.develops: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing rankine and what tests and checks need into $(VENV)" >&2
	@$(INSTALL) -e ".[dev]"
	@touch $(VENV)/.runs $@

setup: $(VENV)/.develops

demo: $(VENV)/.runs
	@$(BIN)/rankine demo -o out/demo --force $(ARGS)

TEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(1)/python -m pytest -n $(WORKERS) --dist loadfile --timeout 600 --durations 20

test: $(VENV)/.develops
	@$(call TEST,$(BIN)) $(ARGS)

test-fast: $(VENV)/.develops
	@$(call TEST,$(BIN)) -m "not slow" $(ARGS)

# Each has an environment of its own without our constraints. torch stays as it is pinned: another
# one would pull gigabytes. Both take ARGS, such as ARGS=tests/checkpoint.
test-latest:
	@$(MAKE) --no-print-directory test-pinned NAME=latest

test-oldest:
	@$(MAKE) --no-print-directory test-pinned NAME=oldest \
	  PIN="$$(sed -n 's/^ *"\(transformers\)>=\(.*\)",/\1==\2/p' pyproject.toml)"

test-pinned: OTHER = .venv-$(NAME)
test-pinned:
	@test -d $(OTHER) || $(PYTHON) -m venv $(OTHER)
	@{ grep '^torch==' constraints.txt; echo "$(PIN)"; } > $(OTHER)/pins.txt
	@$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
	  --upgrade-strategy eager -c $(OTHER)/pins.txt $(PIP_ARGS) -e ".[dev]"
	@$(OTHER)/bin/python -m pip list --disable-pip-version-check | grep -Ei '^(torch|transformers|peft|accelerate|datasets|tokenizers) '
	@$(call TEST,$(OTHER)/bin) $(ARGS)

wheel: $(VENV)/.develops
	@$(BIN)/python -m pip wheel . --no-deps --quiet --disable-pip-version-check --wheel-dir dist
	@ls dist/*.whl

check: $(VENV)/.develops
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python tools/generate.py --check
	@$(BIN)/python -m benchmarks.claims --check

format: $(VENV)/.develops
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/.develops
	@$(BIN)/python tools/generate.py
	@$(BIN)/python -m benchmarks.claims --docs

claims: $(VENV)/.develops
	@$(BIN)/python -m benchmarks.claims $(SYSTEM) $(if $(FULL),--full) $(ARGS)

bench: $(VENV)/.develops
	@for file in benchmarks/speed/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done
