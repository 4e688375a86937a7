# Switchwork. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export MLFLOW_DISABLE_TELEMETRY := true
# Every worker imports thousands of modules: compiling them anew each time would triple the start-up.
export PYTHONDONTWRITEBYTECODE :=
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all check format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(READY)  ## make the virtual environment and build DeepSpeed's C++ op

# torch comes first: deepspeed looks for it while it is being installed, and an unpinned torch is several GB.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools wheel
	$(PIP) torch==2.13.0 numpy ninja
	$(PIP) --no-build-isolation -e '.[dev]'
	$(BIN)/python -m trainer.engines.prebuild
	touch $(READY)

train: setup  ## train the quickstart: a Switch mixture-of-experts language model on real text
	$(BIN)/switchwork train launch/configs/switch_lm_quickstart.yaml

test: setup  ## run the tests (15 to 20 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

test-all: setup  ## run all the tests, the slow ones as well
	$(BIN)/python -m pytest

check: setup  ## format, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and the caches; runs stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
