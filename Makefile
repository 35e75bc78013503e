# Everything a newcomer needs: `make demo`, `make test`. Both create .venv and install what they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export HF_HUB_OFFLINE = 1
export TRANSFORMERS_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: demo federation test lint types attacks chaos models mutants installs bench notebooks wheel clean help

help:            ## what there is
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/  -/'

demo: $(VENV)/demo  ## a private federation on a synthetic corpus, ending with a report
	$(BIN)/fedlora-sim quickstart --out runs/quickstart

federation: $(VENV)/demo  ## a coordinator and three institutions as real processes on this machine, five private rounds
	$(BIN)/python simulations/local/whole_run.py --out runs/federation

test: $(VENV)/dev  ## linters, types, all tests but the long ones
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not attacks and not chaos and not models and not installs" --durations=15

chaos: $(VENV)/dev  ## kill runs at random moments, many times
	$(BIN)/python -m pytest -m chaos -o faulthandler_timeout=7200

attacks: $(VENV)/dev  ## what an outside review tried, at the review's length
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "attacks" -o faulthandler_timeout=7200 tests/attacks

models: $(VENV)/dev  ## train on a small base of each family of transformers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "models or not models" tests/common/model/test_architectures.py

mutants: $(VENV)/dev  ## break each check of secure aggregation, and see a test fail
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants_secagg

installs: $(VENV)/dev  ## the wheel in an empty environment for each role, and every command of that role in it
	$(BIN)/python -m pytest -m installs -o faulthandler_timeout=7200 tests/test_installs.py tests/test_operations.py

bench: $(VENV)/dev  ## the benchmarks whose figures docs/ quotes
	mkdir -p runs/bench
	$(BIN)/python simulations/benchmarks/private_step.py --json runs/bench/private_step.json
	$(BIN)/python simulations/benchmarks/step_memory.py --json runs/bench/step_memory.json
	$(BIN)/python simulations/benchmarks/scale.py --json runs/bench/scale.json
	$(BIN)/python simulations/benchmarks/secure_aggregation.py --json runs/bench/secure_aggregation.json
	$(BIN)/python simulations/benchmarks/federation.py --json runs/bench/federation.json
	$(BIN)/python simulations/benchmarks/bytes.py --json runs/bench/bytes.json
	$(BIN)/python simulations/benchmarks/noise_of_mean.py --json runs/bench/noise_of_mean.json

notebooks: $(VENV)/notebooks  ## execute the notebooks; runs/notebooks has them with what they print
	mkdir -p runs/notebooks
	for each in researcher institution_and_coordinator; do \
	  $(BIN)/jupyter-execute --output=../../runs/notebooks/$$each.ipynb simulations/examples/$$each.ipynb || exit 1; done

wheel: $(VENV)/dev  ## build the wheel, install it into an empty environment, import and run it
	$(BIN)/python -m pytest tests/test_wheel.py

clean:           ## remove what was built and run
	rm -rf $(VENV) build dist *.egg-info runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a local CPU build is taken where one lies on disk.
$(VENV)/demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[sim,demo]"
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(BIN)/pip install -q -c constraints.txt -e ".[sim,demo,dev]"
	touch $@

$(VENV)/notebooks: $(VENV)/demo
	$(BIN)/pip install -q -c constraints.txt -e ".[sim,demo,notebooks]"
	touch $@
