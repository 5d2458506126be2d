# Eight targets; `make` lists them.
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-faults test-gpu lint format clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# In UTF-8 mode whatever the locale, as the program begins: most tests call it in their own process. Bytecode is written
# also where the environment says no (containers do): hundreds of processes would compile the package anew.
PYTEST := PYTHONUTF8=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
STAMP := $(VENV)/.installed

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch by itself first, so that the pinned build is taken before another package asks for a newer one
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(STAMP) ## install, then draw 12 pictures with the embedded model on the CPU
	$(BIN)/python -m zimage_runner +experiment=quickstart

# each worker has a half in a row, so that what a module shares is made once; who is done first takes from the other
test: $(STAMP) ## run the test suite (CPU, minutes)
	$(PYTEST) -n 2 --dist worksteal

test-faults: $(STAMP) ## the long fault campaign: kills, full disks, broken engines
	$(PYTEST) -m slow -n 2

test-gpu: $(STAMP) ## the tests that need a CUDA GPU: placements, compilation, running out of memory
	$(PYTEST) -m gpu -v

lint: $(STAMP) ## ruff and pyright
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright
	# text files opened without an encoding: the locale may not be UTF-8
	$(BIN)/ruff check --preview --select PLW1514 .

format: $(STAMP) ## let ruff rewrite the code
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean: ## remove caches of tools and builds; never outputs, environments or model caches
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find zimage_runner tests benchmarks training -name __pycache__ -type d -prune -exec rm -rf {} +
