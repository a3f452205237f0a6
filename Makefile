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

# Two workers with two threads each: idle threads sleep instead of spinning on the other worker's core.
PYTEST := OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Everything but the large grids, of which each day tests another sample; FQT_COMPILE_TEST_SEED=... repeats one.
test: setup
	$(PYTEST)

# The whole grids, too.
test-all: setup
	$(PYTEST) --all

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache
