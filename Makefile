# make vignette  a tiny reasoning model aligned by ten methods, with evidence: EXP_ID=name SEED=n choose another
# make build   .venv with the pinned development environment (again: instant)
# make test    the whole test suite
# make check   what CI runs: format, lint, types, layers, docs, tests
# make bench   the trainer against its peer, on this machine
# make prove   every long demonstration; one of them: prove-kill, prove-vignette, prove-store, prove-sampling, prove-lab, prove-parity, prove-fuzz

# The first interpreter of 3.11 or newer; PYTHON=... chooses another.
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))) python3)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.built

# One thread per process: tests compare numbers, and small models are slower with more.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help build vignette test check format lint types layers docs bench prove prove-kill prove-vignette prove-store prove-sampling prove-lab prove-parity prove-fuzz

help:
	@sed -n 's/^# make /make /p' Makefile

build: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"bvpo needs Python 3.11 or newer; {sys.executable} is {v.major}.{v.minor}. Set PYTHON=/path/to/python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# EXP_ID names one of experiments/*.toml, or any other name for the vignette's own experiment.
EXP_ID ?= vignette
CONFIG = $(if $(wildcard experiments/$(EXP_ID).toml),experiments/$(EXP_ID).toml,experiments/vignette.toml)

vignette: build
	$(VENV)/bin/bvpo run $(CONFIG) --name $(EXP_ID) $(if $(SEED),--seed $(SEED)) $(ARGS)
	@$(PY) -c 'import os, sys, webbrowser; show = sys.platform == "darwin" or bool(os.environ.get("DISPLAY")); show and webbrowser.open("file://" + os.path.abspath("experiments/$(EXP_ID)/report.html"))'

# Test files are shared out to this many processes; one per CPU core.
JOBS ?= auto

test: build
	$(PY) -m pytest -q -n $(JOBS) --dist loadfile

check: format lint types layers docs test

format: build
	$(PY) -m ruff format --check .

lint: build
	$(PY) -m ruff check .

types: build
	$(PY) -m pyright

layers: build
	$(VENV)/bin/lint-imports --no-logo

docs: build
	$(PY) .ci/check_docs.py

bench: build
	$(PY) benchmarks/trainer.py

# Each writes a dated file below benchmarks/results; `benchmarks/tables.py` then writes docs/performance.md from them.
prove: prove-kill prove-vignette prove-store prove-sampling prove-lab prove-parity prove-fuzz bench

prove-kill: build
	$(PY) benchmarks/kill_test.py --times 60

prove-vignette: build
	$(PY) benchmarks/vignette_kills.py --times 20

prove-store: build
	$(PY) benchmarks/store.py --records 600000

prove-sampling: build
	$(PY) benchmarks/sampling.py

prove-lab: build
	$(PY) benchmarks/lab.py

# Every causal-LM family of the installed transformers; also writes docs/architectures.md.
prove-parity: build
	$(PY) benchmarks/parity.py

# Damaged inputs of every kind: each is taken, or refused in one line.
prove-fuzz: build
	$(PY) benchmarks/fuzz.py
