# One command for each thing a user or a contributor does; each makes the environment it needs.
#   make run    serving environment (no torch), then the service on 127.0.0.1:8000
#   make test   test environment (torch for CPU), then every test
# PYTHON=python3.12 picks an interpreter. An environment is complete when its stamp file is newer than pyproject.toml and
# constraints.txt; an interrupted installation leaves no stamp and is continued by the next call.

PYTHON ?= python3
RUN_ENV := .venv-run
TEST_ENV := .venv-test
SERVICE_ENV := .venv-service
PIP_INSTALL := -m pip install --disable-pip-version-check -q -c constraints.txt
# torch is asked for by its exact version, so that pip never takes a newer CUDA build for it.
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help run test test-service check bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

run: $(RUN_ENV)/.complete ## start the service on http://127.0.0.1:8000 (DINOV2_HOST, DINOV2_PORT, DINOV2_DATA_DIR)
	@exec $(RUN_ENV)/bin/dinov2 serve

test: $(TEST_ENV)/.complete ## run every test
	@$(TEST_ENV)/bin/python -m pytest

test-service: $(SERVICE_ENV)/.complete ## run the tests of the service, in an environment without torch
	@$(SERVICE_ENV)/bin/python -m pytest tests/service

check: $(TEST_ENV)/.complete ## ruff, mypy (strict), import rules
	@$(TEST_ENV)/bin/ruff check .
	@$(TEST_ENV)/bin/ruff format --check .
	@$(TEST_ENV)/bin/mypy
	@$(TEST_ENV)/bin/lint-imports

bench: $(TEST_ENV)/.complete ## the long figures, written to benchmarks/results
	@$(TEST_ENV)/bin/python benchmarks/engine.py

clean: ## remove the environments and caches, not the data folder
	rm -rf $(RUN_ENV) $(TEST_ENV) $(SERVICE_ENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

# What pip installs into each (variables, since a comma would end an argument of `call`).
$(RUN_ENV)_PACKAGES := -e .
$(TEST_ENV)_PACKAGES := $(TORCH) -e '.[train,test,reference,dev]'
$(SERVICE_ENV)_PACKAGES := -e '.[test]'

# $(1): folder
define environment
$(1)/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) lacks venv: apt install python3-venv" >&2; exit 1; }
	@echo "making $(1) ..."
	@rm -f $(1)/.complete
	@$(1)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(1)
	@$(1)/bin/python $(PIP_INSTALL) $$($(1)_PACKAGES)
	@touch $(1)/.complete
endef
$(foreach env,$(RUN_ENV) $(TEST_ENV) $(SERVICE_ENV),$(eval $(call environment,$(env))))
