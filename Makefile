# make env | train | test | test-gpu | check | format | clean. Needs python3 >= 3.10 and make.

PYTHON ?= python3
# The CPU build, a tenth of the CUDA one. For a GPU, after `make clean`:
#   make env TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
STAMP := .venv/.made
# -qq: only errors. Warnings about the machine's own index settings would bury them.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: env train test test-gpu check format clean

env: $(STAMP)

# torch alone first, so that the packages below find it and do not fetch another build. Without its
# own index (--retries 0: not asked twice) the build comes from the machine's usual ones.
$(STAMP): pyproject.toml setup.py
	@echo "installing torch and the test tools into .venv; the first time takes minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --no-deps --retries 0 --timeout 20 --extra-index-url $(TORCH_INDEX) "$(TORCH)"
	@$(PIP) -e '.[test,dev]'
	@touch $@

train: env
	bash examples/quickstart/run.sh

test: env
	$(BIN)/python -m pytest -q -m "not gpu"

test-gpu: env
	$(BIN)/python -m pytest -q -m gpu tests/gpu

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
