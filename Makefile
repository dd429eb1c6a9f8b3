# Two commands do everything on a machine with Python and make: `make demo` and `make test`.
# Set-up happens once, into .venv; no activation is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo
MAKEFLAGS += --no-print-directory

# Threads that spin while they wait cost a multiple of the time on a machine with other work to do.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-thorough test-gpu reliability lint format docs clean

help:
	@echo "make demo    train and analyse experiment=english into $(DEMO)"
	@echo "make test    run tests and doctests"
	@echo "make test-thorough  kills and faults at every moment"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make reliability  kills, faults and hostile traces in full; results in docs/reliability.md"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the documentation as a site, into site/"
	@echo "make format  let ruff rewrite the files"
	@echo "make clean   remove the environment, caches and $(DEMO)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[plot,xarray,data,s3,parquet,changes,llc,docs,bench,dev]"
	@touch $@

demo: $(READY)
	@$(BIN)/python -m examples.train experiment=english hydra.run.dir=$(DEMO) callbacks.gradtrace.overwrite=true
	@$(BIN)/python -m examples.analyze run=$(DEMO)
	@echo "The page, from the trace and these tables (gradtrace report):"
	@$(BIN)/gradtrace report $(DEMO)/trace.zarr --tables $(DEMO)/analysis/tables --output $(DEMO)/analysis/index.html \
		--title "Demo: which texts moved which neurons"

test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 -m pretend tests/device
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

test-thorough: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile -m thorough

test-gpu: $(READY)
	@$(BIN)/python -m pytest -m gpu tests/device

# The full forms of what `make test` does in short, and the table of docs/reliability.md; an hour and more.
reliability: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.store.reliability --write docs/reliability.md

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) site .mypy_cache .pytest_cache .ruff_cache .hypothesis
