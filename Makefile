# `make demo` and `make test` work on a fresh machine with Python 3.10 or newer and nothing else.
PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
VENV ?= .venv
# Test modules that run side by side; a module is one process's, so that what it sets up is set up once.
JOBS ?= 2
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-oldest test-architectures test-tutorials test-package lint format docs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed ## Make the virtual environment

demo: install ## Train a small GPT on real text with the suite's callbacks
	$(BIN)/python -m examples.gpt.demo

test: install ## The test suite (CPU)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-all: install ## The test suite with soaks, shaped networks and kill matrices
	$(BIN)/python -m pytest -m 'slow or not slow' $(ARGS)

$(VENV)-oldest/.installed: pyproject.toml constraints-oldest.txt
	test -x $(VENV)-oldest/bin/python || $(OLDEST_PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	@touch $@

test-oldest: $(VENV)-oldest/.installed ## The test suite with the oldest Python, PyTorch and Lightning that are accepted
	$(VENV)-oldest/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# Each has the extra of its name.
OTHERS := $(VENV)-architectures/.installed $(VENV)-tutorials/.installed
$(OTHERS): $(VENV)-%/.installed: pyproject.toml constraints-architectures.txt
	test -x $(VENV)-$*/bin/python || $(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-architectures.txt \
		torch torchvision
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-architectures.txt \
		-e '.[test,$*]'
	@touch $@

test-architectures: $(VENV)-architectures/.installed ## The structure finder against eighty-eight models of other packages
	HF_HUB_OFFLINE=1 $(VENV)-architectures/bin/python -m tests.structure.test_architectures
	HF_HUB_OFFLINE=1 $(VENV)-architectures/bin/python -m pytest tests/structure tests/layers/test_others.py $(ARGS)

test-tutorials: $(VENV)-tutorials/.installed ## Every example, notebook and page with code, with the packages that they show
	HF_HUB_OFFLINE=1 $(VENV)-tutorials/bin/python -m pytest -m 'slow or not slow' tests/examples tests/docs $(ARGS)

test-package: install ## The sdist and the wheel, in an empty environment; DIST=folder keeps them
	DIST=$(DIST) $(BIN)/python -m pytest -m 'slow or not slow' tests/test_package.py $(ARGS)

lint: install ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: install ## Build the documentation into site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean: ## Remove what was made here
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-architectures $(VENV)-tutorials site logs .pytest_cache .mypy_cache .ruff_cache
