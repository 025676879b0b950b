# Two commands, each complete on a fresh machine with Python >= 3.10 and pip: `make demo` and `make test`. `make` alone
# prints the lines that begin with two #.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
INSTALLED := $(VENV)/.installed

ECOSYSTEM := .venv-ecosystem
EDGE := .venv-edge

# timm's scripts, which are in no package: in TIMM_SCRIPTS, or where `make demo` has cloned them
CLONED := $(firstword $(shell ls -dt .cache/timm-scripts-* 2>/dev/null))
ifneq ($(CLONED),)
export TIMM_SCRIPTS ?= $(abspath $(CLONED))
endif

.PHONY: help demo test lint types ecosystem programs runtimes compat compat-lowest conformance
.PHONY: cards study study-smoke study-gates bench

help:
	@sed -n 's/^## /make /p' Makefile

## demo           install, and go from ImageNet weights to a trained, exported and drawn model: 2 minutes, 5 GB
demo: $(DEMO)
	$(BIN)/python tests/demo.py

## test           install, lint, check types and run the tests: 6 minutes
# The files run in the order of collection: xdist would start those with the fewest tests last, and some take minutes.
test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	@$(if $(TIMM_SCRIPTS),:,echo "To run the tests of timm's train.py and its kin too: make demo clones them (or set TIMM_SCRIPTS)")

## lint           run ruff
lint: $(INSTALLED)
	$(BIN)/ruff check

## types          run mypy
types: $(INSTALLED)
	$(BIN)/mypy

## ecosystem      run the snippets of tests/ecosystem/README.md with the real libraries, in two environments
ecosystem: programs runtimes

## programs       run those of programs that train or use models: fastai, Ultralytics, Transformers and others
programs: $(ECOSYSTEM)/.installed
	$(ECOSYSTEM)/bin/python -m pytest -n 2 tests/ecosystem --ignore tests/ecosystem/test_deployment.py

## runtimes       run those of runtimes, which need other versions of what both depend on
runtimes: $(EDGE)/.installed
	$(EDGE)/bin/python -m pytest -n 2 tests/ecosystem/test_deployment.py

## compat         run a part of the tests with the lowest and the highest versions that the metadata admits, and transformers 4
compat:
	$(PYTHON) tests/compat.py

## compat-lowest  run that part with the lowest versions alone, and keep the environment: 6 GB
compat-lowest:
	$(PYTHON) tests/compat.py --keep lowest

## conformance    run timm's own test suite on all models: an hour
# Up to 16 GB of memory. `make test` runs a part of it.
conformance: $(INSTALLED)
	$(BIN)/python tests/conformance.py -n 2

## cards          write counts.csv, the cards in weights_cards/, their index, and the picture of README
cards: $(INSTALLED)
	$(BIN)/python weights_cards/make_cards.py

## study          train ELA and the other layers with timm's scripts: 1 to 2 hours
# Trains ELA and the other layers with timm's train.py: STUDY=finetune takes about 2 hours on two cores, STUDY=scratch
# more than 1. It skips finished runs. Other variables: DATA, a folder with train/ and test/; TIMM_SCRIPTS, a folder with
# timm's scripts alone; DEVICE (cpu or cuda); JOBS, runs at a time; OPTIONS of study.py.
STUDY ?= finetune
DEVICE ?= cpu
JOBS ?= 2
RUN_STUDY = $(BIN)/python weights_cards/studies/study.py $(STUDY) '$(DATA)' --scripts '$(TIMM_SCRIPTS)' \
	--device $(DEVICE) --jobs $(JOBS)

study: $(INSTALLED)
	$(RUN_STUDY) $(OPTIONS)

## study-smoke    run the study on a few images
study-smoke: $(INSTALLED)
	$(RUN_STUDY) --output output/study-smoke \
		--images 100 --epochs 2 --seeds 1 --img-size 64 --layers ela_b $(OPTIONS)

## study-gates    measure how far the gates of the study's ELA models moved
# Measures how far the gates of the study's ELA models moved, and what they add. TABLE: the table of the study.
TABLE ?= output/study/$(notdir $(DATA)).$(STUDY).csv
study-gates: $(INSTALLED)
	$(BIN)/python weights_cards/studies/gates.py '$(DATA)' '$(TABLE)'

## bench          compare the speed of MobileNetV2 with attention with that of the plain model
# On two idle cores; compiling takes minutes. BENCH: options of bench_models.py, such as --bases resnet50.
bench: $(INSTALLED)
	$(BIN)/python tests/benchmarks/bench_models.py --device '$(DEVICE)' $(BENCH)

# Takes minutes, mostly for PyTorch: 5 GB with CUDA.
$(DEMO): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[demo]'
	touch $@

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[test,demo,study]'
	touch $@

$(ECOSYSTEM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m pip install --disable-pip-version-check \
		--editable '.[ecosystem]' pytest pytest-xdist
	touch $@

$(EDGE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(EDGE)
	$(EDGE)/bin/python -m pip install --disable-pip-version-check --editable '.[edge]' pytest pytest-xdist
	touch $@
