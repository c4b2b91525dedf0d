# Two commands matter: `make demo` and `make test`. Both make .venv first, from pinned versions.
PYTHON ?= python3.11
BIN := .venv/bin
CORPUS ?= toy
DATA_DIR ?=

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.PHONY: install demo test lint
install: .venv/installed

# The whole job once; make demo CORPUS=emodb DATA_DIR=... for real speech
demo: install
	$(BIN)/python training/demo.py --corpus $(CORPUS) $(if $(DATA_DIR),--data_dir $(DATA_DIR))

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
