# The commands of a checkout. `make` alone lists them. They need Python >= 3.11 and nothing else: each creates the
# environment that it uses, once.
#
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu make quickstart    a torch build from another index
#   make test TESTS=tests/modules                                       some of the tests

PYTHON ?= python3
VENV ?= .venv
VENV_LOWEST ?= .venv-lowest
VENV_NEWEST ?= .venv-newest
TESTS ?= tests
WORKERS ?= 2
TORCH_INDEX ?=
TORCH ?=
OUT ?= runs
# A comma would end an argument of $(call).
EVERYTHING := all,dev,docs
FOR_TESTS := all,dev

# One thread in each test process: two processes with two threads each are slower on two cores.
PYTEST = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
	$(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-all real lint format docs lowest newest upgrade architectures bench gpu gpu-wheels clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|' 2>/dev/null \
		|| grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed ## train a small design on text of this machine, evaluate, save, reload, search
	$(VENV)/bin/st-llmpool quickstart --out $(OUT)/quickstart

test: lint ## lint, type check and test (about 13 minutes on two cores)
	$(call PYTEST,$(VENV)) $(TESTS)

test-all: lint ## the same with the slow tests
	$(call PYTEST,$(VENV)) -m "not gpu and not real" $(TESTS)

real: $(VENV)/.installed-dev ## the complete path on a real LLM: LLM=FOLDER (ten minutes with 270M weights)
	REAL_LLM=$(abspath $(LLM)) HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -m real tests/test_real_llm.py

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev ## let ruff fix and format what it can
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

docs: $(VENV)/.installed-dev ## build the documentation into build/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# PyPI's torch 2.11 brings 6 GB with its CUDA libraries, so the first call takes long; a CPU build from TORCH_INDEX does not.
lowest: $(VENV_LOWEST)/.installed-dev ## the tests on the lowest versions that pyproject.toml claims
	$(call PYTEST,$(VENV_LOWEST)) $(TESTS)

newest: $(VENV_NEWEST)/.installed-dev ## the tests on the newest versions that pip resolves today (TESTS= for some)
	$(call PYTEST,$(VENV_NEWEST)) $(TESTS)

# CUDA libraries and build tags (+cpu) are left out: the pins have to serve every build of torch. TORCH=2.13.0 pins that
# one instead of the newest, which may come as 7 GB of CUDA libraries.
upgrade: ## regenerate constraints.txt from the newest versions that pip resolves today; then run make test
	rm -rf $(VENV_NEWEST)
	$(MAKE) $(VENV_NEWEST)/.installed-dev
	{ head -n 1 constraints.txt; $(VENV_NEWEST)/bin/python -m pip freeze --all --exclude-editable --exclude pip \
		| sed 's/+[a-z0-9.]*$$//$(if $(TORCH),;s/^torch==.*/torch==$(TORCH)/)' | grep -viE '^(nvidia|cuda|triton)'; } \
		> constraints.new
	mv constraints.new constraints.txt
	@git diff --stat constraints.txt

architectures: $(VENV)/.installed-dev ## prove the attention of every decoder in transformers; writes the table
	$(VENV)/bin/python -m tests.architectures

bench: $(VENV)/.installed-dev ## ours beside the plain alternative, time and memory: one table in benchmarks/results
	$(VENV)/bin/python benchmarks/run_all.py

# Needs no environment: a bare machine has torch, and what it lacks is in build/gpu-wheels.
gpu: ## everything that only a GPU can show, in nine minutes; tables in $(OUT)/gpu (TEXT_DIR= to pretrain on)
	$(PYTHON) scripts/gpu.py --out $(OUT)/gpu $(if $(wildcard build/gpu-wheels/*.whl),--wheels build/gpu-wheels) \
		$(if $(TEXT_DIR),--text-dir $(TEXT_DIR))

gpu-wheels: $(VENV)/.installed-dev ## collect the wheels that a bare GPU machine lacks
	$(VENV)/bin/python scripts/gpu_wheels.py --out build/gpu-wheels

clean: ## remove environments, caches and build output
	rm -rf $(VENV) $(VENV_LOWEST) $(VENV_NEWEST) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp says that the environment holds what pyproject.toml and the constraints ask for, so the next call is immediate.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,all)

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,$(EVERYTHING))
	@touch $(VENV)/.installed

$(VENV_LOWEST)/.installed-dev: pyproject.toml constraints-lowest.txt
	$(call install,$(VENV_LOWEST),constraints-lowest.txt,$(FOR_TESTS))

# Run at every call: the newest versions change without a change here.
.PHONY: $(VENV_NEWEST)/.installed-dev
$(VENV_NEWEST)/.installed-dev:
	$(call install,$(VENV_NEWEST),/dev/null,$(EVERYTHING))

# torch first and on its own, so that TORCH_INDEX serves torch and nothing else.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "st-llmpool needs Python 3.11 or later, \
	and $(PYTHON) is not. Name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --disable-pip-version-check -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
		$(if $(filter /dev/null,$(2)),--upgrade --upgrade-strategy eager torch,"$$(grep '^torch==' $(2))")
	$(1)/bin/python -m pip install --disable-pip-version-check -q $(if $(filter /dev/null,$(2)),--upgrade --upgrade-strategy \
		eager,-c $(2)) -e '.[$(3)]'
	@touch $@
endef
