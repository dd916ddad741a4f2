# Two commands: `make compare` does the project's main job, `make test` runs the tests; `make test-full` more of them,
# `make docs` builds the documentation.
# All make their own environment first, from pinned versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/$(VERSION).txt

.PHONY: install test test-full compare docs clean

install: $(VENV)/installed-$(VERSION)

$(VENV)/installed-$(VERSION): setup.cfg setup.py pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[test]'
	touch $@

$(CONSTRAINTS):
	@echo "error: no tested versions for $(VERSION); use PYTHON=python3.11 or PYTHON=python3.12" >&2; exit 2

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

test-full: install
	$(BIN)/python -m pytest -m full

compare: install
	$(BIN)/python scripts/compare_optimizers.py --config configs/digits_xnor.py --workdir runs/compare_digits

docs: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) .cache build docs/_build docs/api docs/gallery docs/results docs/notebooks *.egg-info
