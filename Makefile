# `make demo` and `make test` need Python >= 3.10 with pip and venv, and nothing else. PYTHON=python3.12 picks another.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test oracle check format clean
.SILENT:

help:
	echo "make demo     install, build the emoji model for every backend and draw with it"
	echo "make test     install and run all tests"
	echo "make oracle   compare checkpoints changed in thousands of ways with diffusers' own reading (hours)"
	echo "make check    format, lint, types, direction of imports"
	echo "make format   let ruff put the code in order"
	echo "make install  make $(VENV) with everything in it"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dexport needs Python >= 3.10; name one: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

oracle: $(STAMP)
	$(BIN)/python -m tests.exactness

check: $(STAMP)
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet
	$(BIN)/mypy --no-error-summary
	$(BIN)/python -m pytest tests/test_imports.py > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }

format: $(STAMP)
	$(BIN)/ruff format --quiet
	$(BIN)/ruff check --quiet --fix

clean:
	rm -rf demo own-model build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
