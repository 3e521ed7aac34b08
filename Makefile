# The few commands there are. VENV=... chooses where the environment lives, PYTHON=... what makes it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ARGS ?=
FUZZ_MINUTES ?= 5

# Slow tests of what is promised: kills, signals, several processes, memory, hostile checkpoints.
PROMISES := tests/commands/test_kills.py tests/commands/test_sweep.py tests/engine/test_distributed.py \
    tests/evaluation/test_memory.py tests/variants/cfm/test_store.py tests/data/datasets/test_scenes.py \
    tests/annotation/review/test_serve.py tests/annotation/test_classifier_runs.py tests/config/test_trust.py

.PHONY: help venv venv-dev train test test-promises test-browser fuzz lint types docs clean

help:
	@echo "make train      set up, then train the embedded default (ARGS='key=value ...' for more)"
	@echo "make test       set up with the test tools, then lint, types, tests"
	@echo "make test-promises  the slow tests of what is promised: kills, signals, several processes, memory"
	@echo "make test-browser  the review page in Chromium, which is installed where it is missing and one may"
	@echo "make fuzz       hostile files for all readers; FUZZ_MINUTES=$(FUZZ_MINUTES)"
	@echo "make venv       set up only; VENV=$(VENV), PYTHON=$(PYTHON)"
	@echo "make docs       the documentation site, in docs/_build/html"
	@echo "make lint       ruff"
	@echo "make types      mypy"
	@echo "make clean      remove caches (never runs/ or datasets/)"

# A stamp is written last: an environment whose set-up was cut short is set up again.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and 'maskseg needs Python 3.11, 3.12 or 3.13, PYTHON=... names another one')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,docs,fast,sweep,classic,demo,safetensors,pandas]"
	touch $@

$(VENV)/.installed-browser: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[browser]"
	touch $@

venv: $(VENV)/.installed

venv-dev: $(VENV)/.installed-dev

train: venv
	$(BIN)/python tools/train.py $(ARGS)

lint: venv-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv-dev
	$(BIN)/mypy

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not browser" $(ARGS)

test-promises: venv-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow --durations=30 $(PROMISES) $(ARGS)

# The driver brings no browser: it drives the system's.
test-browser: $(VENV)/.installed-browser
	@if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	    else echo "make test-browser needs Chromium: install the package chromium, or Google Chrome" >&2; exit 1; fi; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser $(ARGS)

# FUZZ_READERS='image,YAML' chooses readers, FUZZ_SEED other inputs; failing inputs are in fuzz_failures/.
fuzz: venv-dev
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 FUZZ_MINUTES=$(FUZZ_MINUTES) $(BIN)/python -m fuzz

# Every warning is an error: broken links, pages in no table of contents, unknown references.
docs: venv-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf docs/_build build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
