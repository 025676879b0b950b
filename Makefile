# Two commands, each complete on a fresh machine with Python >= 3.10 and pip: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

ECOSYSTEM := .venv-ecosystem

.PHONY: demo test lint types ecosystem compat conformance cards

demo: $(INSTALLED)
	$(BIN)/python tests/demo.py

test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check

types: $(INSTALLED)
	$(BIN)/mypy

# The README's section 'Use it in', with the real libraries.
ecosystem: $(ECOSYSTEM)/.installed
	$(ECOSYSTEM)/bin/python -m pytest -n 2 tests/ecosystem

# A part of the tests with the lowest and the highest versions that the metadata admits, each in an environment of its own.
compat:
	$(PYTHON) tests/compat.py

# timm's own test suite over all of our models; `make test` runs a part of it.
conformance: $(INSTALLED)
	$(BIN)/python tests/conformance.py -n 2

# Writes weights_cards/ and the README's table of models from timm's registry.
cards: $(INSTALLED)
	$(BIN)/python weights_cards/make_cards.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,demo]'
	touch $@

$(ECOSYSTEM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[ecosystem]' pytest pytest-xdist
	touch $@
