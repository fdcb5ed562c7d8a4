# One entry point for people and CI. Everything works from a fresh clone with nothing else typed.

PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
READY := .venv/ready
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format docs matrix gpu-test clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,triton,finetune]'
	@touch $@

.venv: $(READY)  ## install everything the targets below use into .venv
.PHONY: .venv

demo: $(READY)  ## what mamba-ops does, in about two minutes
	$(BIN)/mamba-ops demo

test: $(READY)  ## the tests, without the slow ones
	$(PYTEST) -m 'not slow'

test-all: $(READY)  ## all tests
	$(PYTEST)

lint: $(READY)  ## ruff, mypy and import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(READY)  ## the documentation site, in build/docs
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

matrix:  ## the tests on several versions of torch, Triton and Transformers; NAMES="2.11 newest" for some
	$(PYTHON) scripts/matrix.py $(NAMES)

gpu-test:  ## tests and benchmarks on a GPU machine, with that machine's own python and torch
	bash benchmarks/gpu_test.sh

clean:  ## remove everything that make made
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
