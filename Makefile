# What a person does with this checkout. Every target sets up .venv as far as it needs it; repeats are quick.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements-dev.txt

# Some machines say that Python keeps no bytecode. The tests start Python again and again, and each would compile all of
# shardq: an eighth of the CPU where they start many.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench soak clean

help:  ## say what there is
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.local  ## start a cluster of its own and show shardq at work on it (make demo ARGS=--json)
	$(BIN)/shardq demo $(ARGS)

test: $(VENV)/.dev  ## run every test (arguments for pytest: make test ARGS="-k lease")
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev  ## ruff, mypy and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench  ## measure every case and write benchmarks/README.md (one case: make bench ARGS=produce)
	$(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python -m benchmarks.report

soak: $(VENV)/.dev  ## ten minutes of load and faults, memory watched (make soak ARGS="--minutes 2")
	$(BIN)/python -m tests.faults.soak $(ARGS)

clean:  ## remove the environment and what builds and checkers left
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: shardq needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.local: $(VENV)/.python pyproject.toml requirements-dev.txt
	$(PIP_INSTALL) --editable '.[local]'
	@touch $@

$(VENV)/.bench: $(VENV)/.python pyproject.toml requirements-dev.txt
	$(PIP_INSTALL) --editable '.[local,bench]'
	@touch $@

# All of .local too: a `make demo` beside the tests must not install shardq anew under them.
$(VENV)/.dev: $(VENV)/.python pyproject.toml requirements-dev.txt
	$(PIP_INSTALL) --editable '.[local,dev]'
	@touch $(VENV)/.local $@
