# One command for each thing a user or a contributor does; each makes the environment it needs.
#   make run    serving environment (no torch), then the service on 127.0.0.1:8000
#   make test   test environment (torch for CPU), then every test
# PYTHON=python3.12 picks an interpreter. An environment is complete when its stamp file is newer than pyproject.toml and
# constraints.txt; an interrupted installation leaves no stamp and is continued by the next call.

PYTHON ?= python3
RUN_ENV := .venv-run
TEST_ENV := .venv-test
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

test-service: .venv-service/.complete ## run the tests of the service, in an environment without torch
	@.venv-service/bin/python -m pytest tests/service

check: $(TEST_ENV)/.complete ## ruff, mypy (strict), import rules
	@$(TEST_ENV)/bin/ruff check .
	@$(TEST_ENV)/bin/ruff format --check .
	@$(TEST_ENV)/bin/mypy
	@$(TEST_ENV)/bin/lint-imports

bench: $(TEST_ENV)/.complete ## the long figures, written to benchmarks/results
	@$(TEST_ENV)/bin/python benchmarks/engine.py

clean: ## remove the environments and caches, not the data folder
	rm -rf .venv-run .venv-test .venv-service .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

# $(1): folder, $(2): what pip installs
define environment
$(1)/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) lacks venv: apt install python3-venv" >&2; exit 1; }
	@echo "making $(1) ..."
	@rm -f $(1)/.complete
	@$(1)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(1)
	@$(1)/bin/python $(PIP_INSTALL) $(2)
	@touch $(1)/.complete
endef
$(eval $(call environment,$(RUN_ENV),-e .))
$(eval $(call environment,$(TEST_ENV),$(TORCH) -e '.[train,test,reference,dev]'))
$(eval $(call environment,.venv-service,-e '.[test]'))
