# Everything a person runs. Needs Python 3.11 or newer, pip and a C compiler; nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per process: two one-thread processes beat one two-thread process on small models.
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo test test-all lint check bench docs format clean

help:
	@echo "make demo    run the demo grid and print its board"
	@echo "make test    run the whole default test suite"
	@echo "make test-all  the same and every variant of every method: minutes more"
	@echo "make check   format, lint, types, tests, documents: what CI runs"
	@echo "make bench   run the benchmarks and print ratios"
	@echo "make docs    generate the tables of the README from the code and the demo's results"
	@echo "make format  format the code and mend what the linter can"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/grid run demo

PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST)

test-all: $(STAMP)
	$(PYTEST) -m ""

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m docs.tables --check

check: lint test

bench: $(STAMP)
	$(BIN)/python -m benchmarks

docs: $(STAMP)
	$(BIN)/python -m docs.tables

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
