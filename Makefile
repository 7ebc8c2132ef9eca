# One command for each thing a user or a contributor does; each makes the environment it needs.
#   make run    serving environment (no torch), then the service on 127.0.0.1:8000
#   make test   test environment (with torch), then every test
# PYTHON=python3.12 picks an interpreter; ARGS="-k cache -x" goes to pytest, ARGS="-n 0" runs the tests in one process.
#
# An environment is complete when its stamp is newer than pyproject.toml and constraints.txt. The stamp carries the
# Python version, so another PYTHON makes it anew; an interrupted installation leaves no stamp and the next call
# continues it. Nothing here needs git.

PYTHON ?= python3
ARGS ?=
RUN_ENV := .venv-run
TEST_ENV := .venv-test
SERVICE_ENV := .venv-service
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
STAMP := .complete-$(PYTHON_VERSION)
# Not compiled at installation: Python compiles the few modules that it imports, in half the time.
PIP_INSTALL := -m pip install --disable-pip-version-check --no-compile -q -c constraints.txt
# torch is asked for by its exact version, so that pip never takes a newer CUDA build for it.
TORCH := torch==2.13.0
# Two workers, which take tests from each other at the end; each starts its own servers when a test asks for them.
PARALLEL := -n 2 --dist worksteal
# ONNX Runtime reports to Microsoft by default; the tests and benchmarks that import it first do not either.
export ORT_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help run test test-service test-cpus check docs bench clean
.NOTPARALLEL:  # with -j: two pips at once would share one egg-info

help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 16

run: $(RUN_ENV)/$(STAMP) ## start the service on http://127.0.0.1:8000 (DINOV2_HOST, DINOV2_PORT, DINOV2_DATA_DIR)
	@exec $(RUN_ENV)/bin/python -m cli serve

test: $(TEST_ENV)/$(STAMP) ## run every test
	@$(TEST_ENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

test-service: $(SERVICE_ENV)/$(STAMP) ## run the tests that need no torch, in an environment without it
	@$(SERVICE_ENV)/bin/python -m pytest $(PARALLEL) tests/service tests/model tests/deploy $(ARGS)

# For ATen, oneDNN and MKL (which heeds it on Intel's processors): the least, AVX2, and all that this processor has.
SSE := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

test-cpus: $(TEST_ENV)/$(STAMP) ## the tests of network and training as on other processors, on one thread and on two
	@failed=; for threads in 1 2; do for isa in "$(SSE)" "$(AVX2)" ""; do \
	  echo "TEST_TORCH_THREADS=$$threads $${isa:-all that the processor has}"; \
	  env $$isa TEST_TORCH_THREADS=$$threads $(TEST_ENV)/bin/python -m pytest tests/model tests/training $(ARGS) || failed=1; \
	done; done; test -z "$$failed"

check: $(TEST_ENV)/$(STAMP) ## ruff, mypy (strict), import rules
	@$(TEST_ENV)/bin/ruff check .
	@$(TEST_ENV)/bin/ruff format --check .
	@$(TEST_ENV)/bin/mypy
	@$(TEST_ENV)/bin/lint-imports

docs: $(TEST_ENV)/$(STAMP) ## write docs/settings.md, metrics.md and commands.md from the code
	@$(TEST_ENV)/bin/python docs/reference.py

bench: $(TEST_ENV)/$(STAMP) ## engines, search, crashes; written to benchmarks/results (the other benchmarks need photos)
	@$(TEST_ENV)/bin/python benchmarks/engine.py
	@$(TEST_ENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[bench]'
	@$(TEST_ENV)/bin/python benchmarks/search.py --vectors 100000 --http
	@$(TEST_ENV)/bin/python benchmarks/soak.py --seconds 60
	@$(TEST_ENV)/bin/python benchmarks/crash.py --kills 200

clean: ## remove environments and caches, not the data folder
	rm -rf $(RUN_ENV) $(TEST_ENV) $(SERVICE_ENV) build *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# What pip installs into each (variables, since a comma would end an argument of `call`).
$(RUN_ENV)_PACKAGES := -e .
$(TEST_ENV)_PACKAGES := $(TORCH) -e '.[train,test,reference,tensorrt-rtx,dev]'
$(SERVICE_ENV)_PACKAGES := -e '.[test]'

# $(1): folder. A folder without pip, or of another Python, is made anew; any other is continued.
define environment
$(1)/$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '' || { echo "no Python runs as '$(PYTHON)': install python3, or make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is Python $(PYTHON_VERSION), 3.11 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make environments: apt install python3-venv" >&2; exit 1; }
	@echo "making $(1): pip installs what it needs, which takes a while the first time" >&2
	@rm -f $(1)/.complete*
	@$(1)/bin/python -c 'import pip, sys; sys.exit("%d.%d.%d" % sys.version_info[:3] != "$(PYTHON_VERSION)")' 2>/dev/null || \
	  $(PYTHON) -m venv --clear $(1)
	@$(1)/bin/python $(PIP_INSTALL) $$($(1)_PACKAGES)
	@touch $$@
endef
$(foreach env,$(RUN_ENV) $(TEST_ENV) $(SERVICE_ENV),$(eval $(call environment,$(env))))
