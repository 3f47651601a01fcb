# make run: the main job end to end; make test: the test suite; make docs: the documentation as a site; make catalog: its index of methods. All create .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

run: $(VENV)/installed
	$(BIN)/python run.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

catalog: $(VENV)/installed
	$(BIN)/python run.py job=methods report=docs

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

.PHONY: run test lint docs catalog
