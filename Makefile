# `make demo` and `make test` do all the set-up themselves on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $(STAMP)

demo: setup
	$(BIN)/fqt1bit finetune --out runs/demo --overwrite

# Two workers; where tests use more threads than one, idle ones sleep instead of spinning on the other worker's core.
PYTEST := OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Of the large grids, and of tests that take long, each day runs another sample; FQT_COMPILE_TEST_SEED=... repeats one.
test: setup
	$(PYTEST) $(ARGS)

# All of them.
test-all: setup
	$(PYTEST) --all

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache
