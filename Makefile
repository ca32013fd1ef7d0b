# Each target sets up what it needs in .venv: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-fast test-long check fix types docs pictures organism setup

demo: $(READY)  ## the whole story on two embedded organisms: locate, verify, enhance, preserve
	$(BIN)/safelocus demo -o runs/demo --overwrite

test: $(READY)  ## every test but those of test-long
	$(BIN)/pytest -n auto --dist worksteal

test-fast: $(READY)  ## the quick loop
	$(BIN)/pytest -n auto --dist worksteal -m "not slow" -q

test-long: $(READY)  ## the tests that take longest: an organism built anew, the README's commands in full
	$(BIN)/pytest -n auto --dist worksteal -m long

check: $(READY)  ## what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

fix: $(READY)  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)  ## rebuild docs/api.md from the docstrings
	$(BIN)/python docs/build_api.py

pictures: $(READY)  ## draw the pictures of docs/concepts.md again
	$(BIN)/python docs/build_images.py
	$(BIN)/python docs/build_diagrams.py

organism: $(READY)  ## rebuild the embedded models from their seed (about fifteen minutes on two cores)
	$(BIN)/python -m safelocus.organism.build

setup: $(READY)

# torch is installed first, by itself and by exact version: a looser request would make pip
# take the newest build for GPUs, which pulls several gigabytes.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)
