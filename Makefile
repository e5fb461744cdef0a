# Needs Python >= 3.11 and nothing else: the virtual environment is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
# Processes of tests beside each other: each waits for processes of Ray, or for limits, most of its time.
TOGETHER := --jobs 3 --output-sync=target --no-print-directory

.PHONY: demo test test-all lint quick setup clean clusters shared-ray others slow-outages slow-faults slow-others

demo: $(INSTALLED)  ## train on the embedded data set
	$(BIN)/bss-ray train

test: $(INSTALLED)  ## lint, types and all tests but the slow ones
	$(MAKE) $(TOGETHER) lint clusters shared-ray others

test-all: test  ## these, the slow tests, and more examples of each property
	$(MAKE) $(TOGETHER) slow-outages slow-faults slow-others

clusters:
	$(PYTEST) -m "not slow and cluster"

shared-ray:
	$(PYTEST) -m "not slow and ray"

others:
	$(PYTEST) -m "not slow and not cluster and not ray"

slow-outages:
	$(PYTEST) -m "slow and outage"

slow-faults:
	$(PYTEST) -m "slow and fault and not outage"

slow-others:
	$(PYTEST) -m "slow and not fault"
	$(PYTEST) -m hypothesis --hypothesis-profile thorough

quick: lint  ## lint, types and the tests that start no Ray
	$(PYTEST) tests/unit tests/property

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(INSTALLED)  ## make the virtual environment

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "bss_ray needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev,jobs]'
	touch $@

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
