# Everything here works on a machine that has only make and Python 3.11 or newer:
#   make demo    a fleet learns on real data, on this machine, without network
#   make demo-delivery   its model reaches 20 real processes, and a bad one is taken back; minutes
#   make test    all tests
# What is needed is installed into .venv first. Another Python: make test PYTHON=python3.12
# More arguments: make test ARGS="-k config"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
ARGS ?=

.PHONY: help demo demo-delivery test lint docs bench nightly nightly-inputs nightly-packages nightly-audit nightly-races \
  nightly-step nightly-anchor nightly-accuracy nightly-chaos clean

help:
	@sed -n 's/^#   make/make/p' Makefile
	@echo "make lint    style, types, layers, generated code"
	@echo "make docs    the generated parts of docs/"
	@echo "make bench   measurements (make bench ARGS=--list)"
	@echo "make nightly a million inputs for the decoders, the gRPC and the HTTP ports; known vulnerabilities; audits and accuracy under privacy (LEPTON_DATA=FOLDER for all)"
	@echo "make clean   remove .venv and all caches"

demo: $(VENV)/.sim
	@$(BIN)/lepton demo $(ARGS)

demo-delivery: $(VENV)/.all
	@$(BIN)/lepton demo delivery $(ARGS)

test: $(VENV)/.dev
	@$(BIN)/pytest -n auto --dist loadfile $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy .ci/advisories.py .ci/check_wheel.py .ci/reference_docs.py
	$(BIN)/lint-imports --no-logo
	$(BIN)/bandit -q -ll -ii -c pyproject.toml -r lepton_fl client/lepton_client server/lepton_server simulations/lepton_simulations strategies/lepton_strategies
	PYTHON=$(BIN)/python proto/generate --check

docs: $(VENV)/.dev
	$(BIN)/python .ci/reference_docs.py

bench: $(VENV)/.dev
	@$(BIN)/python benchmarks $(ARGS)

# What takes too long for every build; part by part with `make -k`, so that one that fails ends no other. What
# is kept is of one commit: a part that was ended goes on where it was.
KEPT := build/nightly/$(shell git rev-parse --short HEAD 2>/dev/null || echo export)

nightly: nightly-inputs nightly-packages nightly-audit nightly-races nightly-step nightly-chaos \
  $(if $(LEPTON_DATA),nightly-anchor nightly-accuracy)

nightly-inputs: $(VENV)/.dev
	@$(PIP) atheris 2> /dev/null || echo "atheris does not install here: inputs are not guided by coverage"
	@$(BIN)/python tests/test_decoders.py --inputs 1000000
	@$(BIN)/python benchmarks noise --inputs 1000000

# pip-audit has an environment of its own: its dependencies are none of ours.
nightly-packages: $(VENV)/.dev
	@$(BIN)/python -m pip check
	@test -x build/pip-audit/bin/pip-audit || { $(PYTHON) -m venv build/pip-audit && \
	  build/pip-audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit; } 2> /dev/null || \
	  echo "pip-audit does not install here"
	@$(BIN)/python .ci/advisories.py build/pip-audit/bin/pip-audit \
	  "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"

nightly-chaos: $(VENV)/.dev
	@$(BIN)/python benchmarks chaos --jobs 2

nightly-audit: $(VENV)/.dev
	@$(BIN)/python benchmarks one_run_audit

nightly-races: $(VENV)/.dev
	@LEPTON_SCHEDULES=1000 $(BIN)/pytest tests/lepton_server/test_ledger_races.py

nightly-step: $(VENV)/.dev
	@$(BIN)/python benchmarks dp_sgd --only speed

nightly-anchor: $(VENV)/.dev
	@$(BIN)/python benchmarks dp_sgd --only anchor --data "$(LEPTON_DATA)" --seeds 5 --kept $(KEPT)/anchor.jsonl

nightly-accuracy: $(VENV)/.dev
	@$(BIN)/python benchmarks private_accuracy --data "$(LEPTON_DATA)" --kept $(KEPT)/accuracy.jsonl

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and by itself: pip then takes a CPU build where one is at hand.
$(VENV)/.torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Lepton FL needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) ..."; $(PYTHON) -m venv $(VENV); } || { \
	  rm -rf $(VENV); echo "Could not make a virtual environment (Debian: apt-get install python3-venv)." >&2; exit 1; }
	@echo "Installing torch ..."
	@$(PIP) 'torch>=2.13,<2.14'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "Installing lepton-fl with its development tools ..."
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.sim $(VENV)/.all

$(VENV)/.all: $(VENV)/.torch pyproject.toml
	@echo "Installing lepton-fl with all its roles ..."
	@$(PIP) --editable '.[all]'
	@touch $@ $(VENV)/.sim

$(VENV)/.sim: $(VENV)/.torch pyproject.toml
	@echo "Installing lepton-fl with its simulation ..."
	@$(PIP) --editable '.[sim]'
	@touch $@
