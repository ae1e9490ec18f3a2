# make demo   see the whole path on handwritten digits, offline, in minutes
# make test   format check, lint, types, tests
# make faults the whole fault sweep, in minutes
# make matrix every family of backbones through every scenario, in an hour and a half
# make fuzz   damaged images, for MINUTES=10
#
# Both create .venv and install what they need the first time; a second call installs nothing until
# pyproject.toml changes. pip's own PIP_* variables are honoured, PYTHON=... names another interpreter.

VENV   := .venv
PYTHON ?=
MINUTES ?= 10
RUN    := $(VENV)/bin/python

# A process of tests a core, each with one thread: that takes half the time of one with two.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses logical --dist worksteal

# Not a branch of what keeps people's work may be untested.
COVERED := tests/cache tests/machine/test_files.py tests/runs/test_directory.py
COVERAGE := $(foreach module,cache machine.files runs.directory,--cov=tlcli.$(module)) --cov-branch --cov-fail-under=100

.DEFAULT_GOAL := help
.PHONY: help demo test faults matrix fuzz real format clean distclean
.DELETE_ON_ERROR:

help:
	@echo 'make demo       the whole path on handwritten digits, offline, in minutes'
	@echo 'make test       format check, lint, types and tests'
	@echo 'make faults     fail or kill every system call of the cache and the run directory, in turn'
	@echo 'make matrix     every family of backbones through every scenario; writes docs/backbones.md'
	@echo 'make fuzz       decode damaged and hostile images in child processes, for MINUTES=10'
	@echo 'make real       tests on real data, found through TLCLI_REAL_ASSETS'
	@echo 'make format     format the code and fix what can be fixed by itself'
	@echo 'make clean      delete what demo and tests leave behind'
	@echo 'make distclean  the same, and .venv'

demo: $(VENV)/.stamp-runtime
	$(RUN) -m tlcli demo --overwrite

test: $(VENV)/.stamp-test
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(PYTEST) $(foreach path,$(COVERED),--ignore $(path))
	$(PYTEST) $(COVERED) $(COVERAGE)

faults: $(VENV)/.stamp-test
	OPENBLAS_NUM_THREADS=1 $(RUN) -m tests.faults.sweep

matrix: $(VENV)/.stamp-test
	OMP_NUM_THREADS=1 $(RUN) -m tests.matrix.matrix

fuzz: $(VENV)/.stamp-test
	$(RUN) -m tests.bad_inputs.fuzz_decode --minutes $(MINUTES)

real: $(VENV)/.stamp-test
	$(RUN) -m pytest -m 'real and not slow and not gpu and not network'

format: $(VENV)/.stamp-test
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf build dist demo htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find tlcli tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

$(VENV)/.stamp-python:
	@found=; \
	for candidate in $(if $(PYTHON),'$(PYTHON)',python3 python3.14 python3.13 python3.12 python3.11); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "tlcli needs Python 3.11 or newer; found: $$('$(or $(PYTHON),python3)' --version 2>&1)." >&2; \
	  echo 'Install one, or name it: make PYTHON=/path/to/python3.12 ...' >&2; exit 1; \
	fi; \
	$(RUN) -m pip --version >/dev/null 2>&1 || "$$found" -m venv --clear $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "$$found cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	}
	@touch $@

$(VENV)/.stamp-runtime: pyproject.toml | $(VENV)/.stamp-python
	@echo 'Installing tlcli and what it needs into $(VENV); the first time this downloads torch.'
	$(RUN) -m pip install --quiet --progress-bar on --editable .
	@touch $@

# The tests' needs contain the demo's, so this satisfies both.
$(VENV)/.stamp-test: pyproject.toml | $(VENV)/.stamp-python
	@echo 'Installing tlcli and what it and its tests need into $(VENV); the first time this downloads torch.'
	$(RUN) -m pip install --quiet --progress-bar on --editable '.[test]'
	@touch $(VENV)/.stamp-runtime $@
