# Each target sets up what it needs into .venv; a second call installs nothing.
#
#   make demo     federate a real small model over real text, and show the report
#   make test     the test suite

VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export NO_MKDOCS_2_WARNING = 1

# The first of these that runs and is 3.11 or newer; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-network test test-slow test-figures lint bench docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp-dev  ## install fedlm and everything for tests into .venv

demo: $(VENV)/.stamp-core  ## federated against silos alone and pooled data, on a real model; opens the report
	$(BIN)/fedlm init news --out runs/demo.yaml --force
	$(BIN)/fedlm compare runs/demo.yaml --run-dir runs/demo --budgets steps --force $(DEMO)
	@echo "The report: $(CURDIR)/runs/demo/report.html"
	@if [ "$$(uname)" = Darwin ] && command -v open >/dev/null; then open runs/demo/report.html || true; \
	elif [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] && command -v xdg-open >/dev/null; then \
		xdg-open runs/demo/report.html >/dev/null 2>&1 & fi

demo-network: $(VENV)/.stamp-network  ## the same recipe over a network on this machine, with mutual TLS: the same bits
	$(BIN)/fedlm network demo --out runs/network-demo

test: $(VENV)/.stamp-dev  ## the test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(ARGS)

test-slow: $(VENV)/.stamp-dev  ## tests on the real model and the longest others: tens of minutes, needs the package registry once
	$(BIN)/python -m pytest -m slow -n auto --maxprocesses 2 --durations=20 $(ARGS)

test-figures: $(VENV)/.stamp-dev  ## what the documents say of the real model, measured again: minutes each
	$(BIN)/python -m pytest -m figures -s $(ARGS)

lint: $(VENV)/.stamp-dev  ## ruff, mypy --strict, order of imports between rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

bench: $(VENV)/.stamp-dev  ## the benchmarks of docs/benchmarks.md, on an idle machine
	@set -e; for bench in benchmarks/*.py; do echo "== $$bench"; $(BIN)/python $$bench; done

docs: $(VENV)/.stamp-docs  ## the documentation, into site/
	$(BIN)/fedlm recipe reference --out docs/recipe-reference.md
	$(BIN)/fedlm recipe matrix --out docs/composition.md
	$(BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html"

clean:  ## remove caches and build products; runs/ and .venv stay
	rm -rf site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .benchmarks
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# constraints.txt pins torch too, so no extra can bring another one.
$(VENV)/.stamp-core: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "fedlm needs Python 3.11 or newer with venv; name it: make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing fedlm into $(VENV) (with $(PYTHON), a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.stamp-network: $(VENV)/.stamp-core
	@echo "Installing what networks need into $(VENV)"
	@$(INSTALL) -e '.[network]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-core
	@echo "Installing what tests and linters need into $(VENV)"
	@$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.stamp-network $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-core
	@echo "Installing what the documentation needs into $(VENV)"
	@$(INSTALL) -e '.[docs]'
	@touch $@
