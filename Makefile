# make env | train | data-demo | adapt-demo | test | test-failed | test-upstream | test-gpu |
# gpu-report | container-test | check | format | clean.
# Needs python3 >= 3.10 and make.

PYTHON ?= python3
# The tested torch, and pip flags to install it, for example an --index-url of CPU or CUDA builds.
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=

# Flags of make gpu-report.
REPORT_FLAGS ?=

# Concurrent test processes.
JOBS ?= 2

# Python 3.12 and newer have another line of megatron-core than 3.11, and environments of their own.
VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
UPSTREAM = .venv-upstream-$(VERSION)
# What depends on megatron-core and Python most: its numbers, checkpoints and collectives, the packages'
# own tests, and which extras there are. Rules on source text and benchmarks read the same.
UPSTREAM_TESTS := $(addprefix tests/unit/,app moe_ext trainer test_extras.py) \
	tests/recipes/test_earlier_run.py $(addprefix tests/distributed/test_, \
	parity.py resume.py traffic.py hostile_checkpoint.py convert_resume.py)

BIN := .venv/bin
STAMP := .venv/.made
# -qq shows errors only; warnings about index settings of the machine would hide them.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
PIP := $(BIN)/python $(PIP_INSTALL)

.PHONY: env train data-demo adapt-demo test test-failed test-upstream test-gpu gpu-report container-test \
	check format clean

env: $(STAMP)

# torch first, so that the packages below use it instead of another build.
$(STAMP): pyproject.toml setup.py
	@echo "installing torch and the test tools into .venv; the first time takes minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) $(TORCH) $(TORCH_FLAGS)
	@$(PIP) -e '.[test,dev]'
	@touch $@

train: env
	bash examples/quickstart/run.sh

data-demo: env
	bash examples/data_demo/run.sh

adapt-demo: env
	bash examples/adapt_tiny/run.sh

# Distributes whole files over single-threaded processes, because the tests of a file share fixtures.
test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -m "not gpu and not container" \
		-n $(JOBS) --dist loadfile

# What failed last, one after another, with nothing beside it.
test-failed:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v -rs -m "not gpu and not container" \
		--last-failed --last-failed-no-failures none

# make test-upstream PYTHON=python3.12. The first time installs torch, for these Pythons maybe a CUDA
# build of gigabytes.
test-upstream:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { echo "make test-upstream \
	tests the megatron-core of Python 3.12 and newer; this is $(VERSION): PYTHON=python3.12" >&2; exit 2; }
	@$(MAKE) --no-print-directory $(UPSTREAM)/.made
	OMP_NUM_THREADS=1 $(UPSTREAM)/bin/python -m pytest -q -rs -m "not gpu and not container" \
		-n $(JOBS) --dist loadfile $(UPSTREAM_TESTS)
	bash tests/recipes/quickstart.sh "$(CURDIR)/$(UPSTREAM)/bin/python"

.venv-upstream-%/.made: pyproject.toml setup.py
	@echo "installing torch and the test tools into $(@D); the first time takes minutes"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) $(TORCH) $(TORCH_FLAGS)
	@$(@D)/bin/python $(PIP_INSTALL) -e '.[test]'
	@touch $@

test-gpu: env
	$(BIN)/python -m pytest -q -m gpu tests/gpu

# Measures on one GPU, within 40 minutes, and writes docs/gpu.md; REPORT_FLAGS='--parts layer,step' for less.
gpu-report: env
	$(BIN)/python -m benchmarks.gpu_report $(REPORT_FLAGS)

# Builds the images as root; needs minutes and, meanwhile, gigabytes.
container-test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m container --durations 6 tests/container

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck -x examples/*/*.sh examples/slurm/*.sbatch tests/slurm/*.sh docker/*.sh tests/recipes/*.sh \
		.ci/run .ci/newer_python

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-upstream-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
