# Needs Python 3.11 or newer, git and make; everything else is installed into .venv.
#   make test PYTHON=python3.12                 another Python
#   make test PIP_ARGS="--index-url URL"        arguments for every call of pip

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install $(PIP_ARGS)
REQUIREMENTS := pyproject.toml setup.py constraints.txt

# The versions of Triton that the kernels are compiled with: the oldest that we allow, the pinned one, the newest.
TRITONS := 3.6.0 3.7.1 3.9.0

.DEFAULT_GOAL := help
.PHONY: help test slow lint demo bench kernels clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' $(MAKEFILE_LIST) | expand -t 14

test: lint ## install what is needed, lint, and run the tests
	@echo "==> Running the tests"
	$(BIN)/python -m pytest -n auto

slow: $(VENV)/.quant ## run the tests that take long
	@echo "==> Running the slow tests"
	$(BIN)/python -m pytest -m slow -n auto --dist worksteal -v

lint: $(VENV)/.dev ## check the code and its layout with ruff
	@echo "==> Checking the code"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: $(VENV)/.demo ## install what is needed, and show what fishkern does
	@echo "==> Running the demo"
	$(BIN)/fishkern demo

bench: $(VENV)/.dev ## measure speed and record it (see benchmarks/README.md)
	@echo "==> Running the benchmarks"
	$(BIN)/python -m benchmarks run

kernels: $(VENV)/.dev $(TRITONS:%=.triton/%) ## compile the kernels with each Triton, and record what they take (an hour)
	@for version in $(TRITONS); do \
		echo "==> Compiling for GPUs with Triton $$version"; \
		PYTHONPATH=.triton/$$version:. $(BIN)/python -m tests.kernels.offline record || exit 1; \
	done
	git diff --stat tests/kernels

.triton/%: | $(VENV)/.made
	$(PIP) --no-deps --target $@ triton==$* || (rm -rf $@; exit 1)

clean: ## remove the environment, caches and builds
	rm -rf $(VENV) .triton build dist *.egg-info .benchmarks .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@echo "==> Making the environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fishkern needs Python 3.11 or newer; name one: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	@touch $@

$(VENV)/.dev: $(REQUIREMENTS) | $(VENV)/.made
	@echo "==> Installing fishkern with the tools to test and measure it (some minutes the first time)"
	$(PIP) -c constraints.txt -e ".[all,bench,dev]"
	@touch $@ $(VENV)/.demo

$(VENV)/.quant: $(REQUIREMENTS) | $(VENV)/.made
	@echo "==> Installing fishkern with the tools to test it, and the libraries of quantised weights"
	$(PIP) -c constraints.txt -e ".[all,bench,dev,quant]"
	@touch $@ $(VENV)/.dev $(VENV)/.demo

$(VENV)/.demo: $(REQUIREMENTS) | $(VENV)/.made
	@echo "==> Installing fishkern (some minutes the first time)"
	$(PIP) -c constraints.txt -e ".[all]"
	@touch $@
