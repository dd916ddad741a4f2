# Two commands: `make compare` does the project's main job, `make test` runs the tests; `make test-full` more of them,
# `make docs` builds the documentation, `make docs-check` checks what it built.
# All make their own environment first, from pinned versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/$(VERSION).txt

.PHONY: install test test-full compare docs docs-check clean

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

SITE := docs/_build/html
NODE := docs/_build/node
BROWSER := $(firstword $(shell command -v chromium chromium-browser google-chrome 2>/dev/null))
CHECKED := start.html gallery/index.html guides/deep_frank_wolfe.html results/digits_xnor/report.html zoo/index.html \
  api/layers.html

docs-check: install
	$(BIN)/python docs/check_site.py $(SITE)
ifeq ($(and $(BROWSER),$(shell command -v npm)),)
	@echo "left out: what axe-core says of pages, which needs npm, and Chromium or Chrome"
else
	mkdir -p $(NODE) && cp docs/package.json $(NODE)
	npm install --silent --no-package-lock --prefix $(NODE)
	node docs/check_pages.mjs $(SITE) $(BROWSER) $(CHECKED)
endif

clean:
	rm -rf $(VENV) .cache build docs/_build docs/api docs/gallery docs/zoo docs/results docs/notebooks *.egg-info
