# The commands for users and contributors. Each command creates the virtual environment that it needs.
#   make run    create the serving environment (without torch) and start the service on 127.0.0.1:8000;
#               MODEL=dinov2_vits14 downloads and serves published weights instead of the demo model
#   make test   create the test environment (with torch) and run every test
# PYTHON=python3.12 selects an interpreter. ARGS="-k cache -x" is passed to pytest; ARGS="-n 0" runs the tests in one
# process.
#
# An environment is complete if its stamp file is newer than pyproject.toml and constraints.txt. The name of the stamp
# has the Python version, so a different PYTHON rebuilds the environment. An interrupted installation leaves no stamp,
# and the next call continues the installation. No command needs git.

PYTHON ?= python3
ARGS ?=
RUN_ENV := .venv-run
TEST_ENV := .venv-test
SERVICE_ENV := .venv-service
RAY_ENV := .venv-ray
SBOM_ENV := .venv-sbom
HASHES_ENV := .venv-hashes
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
STAMP := .complete-$(PYTHON_VERSION)
# --no-compile, because Python compiles the few modules that it imports, which takes half the time.
PIP_INSTALL := -m pip install --disable-pip-version-check --no-compile -q -c constraints.txt
# The exact version of torch, so that pip never installs a newer CUDA build.
TORCH := torch==2.13.0
# Three workers on two cores, because many tests wait: 11 minutes instead of 13. A worker that has finished takes tests
# from another. Each worker starts its own servers.
PARALLEL := -n 3 --dist worksteal
# ONNX Runtime sends telemetry to Microsoft by default. This turns it off in the tests and benchmarks too.
export ORT_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help run test test-service ray-env test-ray test-cpus check docs bench hashes sbom clean
.NOTPARALLEL:  # with -j, two pip processes would write to the same egg-info folder

help: ## print this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 16

run: $(RUN_ENV)/$(STAMP) ## start the service on http://127.0.0.1:8000; MODEL=dinov2_vits14 serves published weights
	@exec $(RUN_ENV)/bin/python -m cli serve $(if $(MODEL),--model "$(MODEL)")

test: $(TEST_ENV)/$(STAMP) ## run every test
	@$(TEST_ENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

test-service: $(SERVICE_ENV)/$(STAMP) ## run the tests that need no torch, in an environment without torch
	@$(SERVICE_ENV)/bin/python -m pytest $(PARALLEL) tests/service tests/model tests/deploy $(ARGS)

ray-env: $(RAY_ENV)/$(STAMP)

test-ray: $(RAY_ENV)/$(STAMP) ## run the tests on a Ray cluster of two nodes, in an environment with Ray (240 MB on the disk)
	@$(RAY_ENV)/bin/python -m pytest tests/training/curate/test_ray_engine.py $(ARGS)

# Instruction sets for ATen, oneDNN and MKL (MKL reads its variable on Intel processors only). The test runs with the
# smallest set, with AVX2, and with all that this processor has.
SSE := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

test-cpus: $(TEST_ENV)/$(STAMP) ## run the tests of model/ and training/ with other instruction sets, on one and two threads
	@failed=; for threads in 1 2; do for isa in "$(SSE)" "$(AVX2)" ""; do \
	  echo "TEST_TORCH_THREADS=$$threads $${isa:-all that the processor has}"; \
	  env $$isa TEST_TORCH_THREADS=$$threads $(TEST_ENV)/bin/python -m pytest tests/model tests/training $(ARGS) || failed=1; \
	done; done; test -z "$$failed"

check: $(TEST_ENV)/$(STAMP) ## run ruff, mypy (strict) and the check of the import rules
	@$(TEST_ENV)/bin/ruff check .
	@$(TEST_ENV)/bin/ruff format --check .
	@$(TEST_ENV)/bin/mypy
	@$(TEST_ENV)/bin/lint-imports

docs: $(TEST_ENV)/$(STAMP) ## generate docs/settings.md, metrics.md and commands.md from the code
	@$(TEST_ENV)/bin/python docs/reference.py

bench: $(TEST_ENV)/$(STAMP) ## run the benchmarks that need no images: engines, search, crashes, GPU code without a GPU
	@$(TEST_ENV)/bin/python benchmarks/engine.py
	@$(TEST_ENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[bench]'
	@$(TEST_ENV)/bin/python benchmarks/search.py --vectors 100000 --http
	@$(TEST_ENV)/bin/python benchmarks/soak.py --seconds 60
	@$(TEST_ENV)/bin/python benchmarks/crash.py --kills 200
	@$(TEST_ENV)/bin/python benchmarks/gpu_proofs.py all

# The images install these files with --require-hashes. In the GPU image, ONNX Runtime for CPUs is replaced. setuptools
# builds the project itself.
COMPILE = $(HASHES_ENV)/bin/uv pip compile -q --universal --generate-hashes --no-annotate --no-header -c constraints.txt

hashes: $(HASHES_ENV)/$(STAMP) ## write hashes/*.txt, with the sha256 of the packages in the images, from constraints.txt
	@mkdir -p hashes
	@$(COMPILE) pyproject.toml hashes/build.in -o hashes/serve.txt
	@$(COMPILE) pyproject.toml --extra gpu --no-emit-package onnxruntime -o hashes/gpu.txt
	@$(COMPILE) pyproject.toml --extra train -o hashes/train.txt

sbom: $(RUN_ENV)/$(STAMP) $(SBOM_ENV)/$(STAMP) ## write sbom.json, a bill of materials of the serving environment (CycloneDX)
	@$(SBOM_ENV)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-format JSON --output-file sbom.json $(RUN_ENV)

clean: ## remove environments and caches, not the data folder
	rm -rf $(RUN_ENV) $(TEST_ENV) $(SERVICE_ENV) $(RAY_ENV) $(SBOM_ENV) $(HASHES_ENV) build *.egg-info sbom.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# The packages of each environment. They are variables, because a comma would end an argument of `call`.
$(RUN_ENV)_PACKAGES := -e .
$(TEST_ENV)_PACKAGES := $(TORCH) -e '.[train,test,reference,tensorrt-rtx,dev]'
$(SERVICE_ENV)_PACKAGES := -e '.[test]'
$(SBOM_ENV)_PACKAGES := cyclonedx-bom  # Apache-2.0
$(HASHES_ENV)_PACKAGES := uv  # Apache-2.0 or MIT

# $(1) is the folder. A folder without pip or with another Python version is rebuilt. Otherwise the installation in it
# continues.
define environment
$(1)/$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '' || { echo "'$(PYTHON)' does not run: install python3, or run make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is Python $(PYTHON_VERSION), but 3.11 or newer is needed: run make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot create virtual environments: apt install python3-venv" >&2; exit 1; }
	@echo "creating $(1): pip installs the packages, which takes a while the first time" >&2
	@rm -f $(1)/.complete*
	@$(1)/bin/python -c 'import pip, sys; sys.exit("%d.%d.%d" % sys.version_info[:3] != "$(PYTHON_VERSION)")' 2>/dev/null || \
	  $(PYTHON) -m venv --clear $(1)
	@$(1)/bin/python $(PIP_INSTALL) $$($(1)_PACKAGES)
	@touch $$@
endef
$(foreach env,$(RUN_ENV) $(TEST_ENV) $(SERVICE_ENV) $(SBOM_ENV) $(HASHES_ENV),$(eval $(call environment,$(env))))

# Only Ray and packages that it needs are installed here. All others are those of the test environment.
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

$(RAY_ENV)/$(STAMP): $(TEST_ENV)/$(STAMP)
	@echo "creating $(RAY_ENV): pip installs Ray" >&2
	@rm -f $(RAY_ENV)/.complete*
	@$(PYTHON) -m venv --clear $(RAY_ENV)
	@echo "import site; site.addsitedir('$$($(TEST_ENV)/bin/python $(PURELIB))')" \
	  > "$$($(RAY_ENV)/bin/python $(PURELIB))/test-packages.pth"
	@$(RAY_ENV)/bin/python $(PIP_INSTALL) 'ray[data]'
	@touch $@
