# SPDX-License-Identifier: Apache-2.0
# make demo   train Hope on real text, compare, show the result
# make test   the tests          make check   format and checks
# make docs   the site, its examples run
SHELL := /bin/sh
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal -q

.PHONY: demo test check slow faults docs wheel clean

demo: $(VENV)/.ready
	$(BIN)/nlx run demo

test: $(VENV)/.ready
	$(PYTEST) -m "not slow"

slow: $(VENV)/.ready
	$(PYTEST) -m slow

faults: $(VENV)/.ready
	$(BIN)/python -m nlx_experiments.faults --kills 100 --harms all

check: $(VENV)/.ready
	$(BIN)/ruff format $(if $(CI),--check) .
	$(BIN)/ruff check $(if $(CI),,--fix) .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(VENV)/.ready
	$(BIN)/pip wheel -q --no-deps -w dist .

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .hypothesis .ruff_cache dist site

$(VENV)/.ready: pyproject.toml constraints.txt
	sh .ci/venv $(VENV)
	@touch $@
