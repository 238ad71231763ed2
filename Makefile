# Every target makes its own environment in .venv and installs what it lacks, once.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
STAMPS := $(VENV)/stamps
CLIENTS := .venv-clients

.PHONY: demo test test-slow clients lint format clean

demo: $(STAMPS)/demo
	$(BIN)/python -m demo.digits

# One thread per worker: the tests' tensors are small, and workers would fight for the cores.
test: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow

# Programs written for backpack-for-pytorch give the same numbers on it and on this library.
clients: $(CLIENTS)/original/stamp $(CLIENTS)/ours/stamp
	$(BIN)/python clients/compare.py $(foreach each,$(^D),$(each)/bin/python) --brief

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info demo/output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: empty files that are newer than what they were installed from.

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact version; a looser request may fetch a build many times larger.
$(STAMPS)/torch: constraints.txt | $(BIN)/python
	$(PIP) $$(grep '^torch==' constraints.txt)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/lint: $(STAMPS)/%: pyproject.toml $(STAMPS)/torch
	$(PIP) --editable ".[$*]"
	@touch $@

# Two environments that differ in the library only.
$(CLIENTS)/original/stamp: LIBRARY = backpack-for-pytorch==1.7.1
$(CLIENTS)/ours/stamp: LIBRARY = --editable .
$(CLIENTS)/%/stamp: constraints.txt clients/dependencies.txt clients/requirements.txt | $(BIN)/python
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt -r clients/dependencies.txt
	$(@D)/bin/python -m pip install --quiet --no-deps -r clients/requirements.txt $(LIBRARY)
	@touch $@
