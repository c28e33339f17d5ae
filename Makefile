# make env | train | test | test-gpu | container-test | check | format | clean.
# Needs python3 >= 3.10 and make.

PYTHON ?= python3
# The tested torch, and pip flags to install it, for example an --index-url of CPU or CUDA builds.
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=

# Concurrent test processes.
JOBS ?= 2

BIN := .venv/bin
STAMP := .venv/.made
# -qq shows errors only; warnings about index settings of the machine would hide them.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: env train test test-gpu container-test check format clean

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

# Distributes whole files over single-threaded processes, because the tests of a file share fixtures.
test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -m "not gpu and not container" \
		-n $(JOBS) --dist loadfile

test-gpu: env
	$(BIN)/python -m pytest -q -m gpu tests/gpu

# Builds the images as root; needs minutes and, meanwhile, gigabytes.
container-test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m container --durations 6 tests/container

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck -x examples/*/*.sh examples/slurm/*.sbatch tests/slurm/*.sh docker/*.sh .ci/run

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
