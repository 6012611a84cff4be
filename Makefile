# make train    install, then train the quickstart (three minutes on two cores, after the install)
# make test     install, then lint, types and the whole test suite
# make test-trl-next  the tests of memhead in TRL's trainers once more, with the next TRL
# make lint     ruff and the type checker; make format: let ruff rewrite what it can
# make mutants  change the code by a tool, a character at a time, and see whether a test notices (hours; docs/testing.md);
#               MODULES="memhead/support.py" MOST=20 runs twenty changes of one module, START=3 twenty others
# make notebook  bring notebooks/*.ipynb and their .py twins in step, the newer one winning
# make clean    remove the environment and the caches; runs/ stays
#
# make address ADDRESS=https://github.com/you/memhead   write the repository's address wherever it is published
#
# PYTHON=python3.12 chooses the interpreter of the environment, ARGS="run.seed=1" goes to train_grpo.py, TORCH_INDEX=URL is
# the package index that torch comes from (.ci/torch_index chooses it otherwise).

PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable
TRL_NEXT := $(VENV)/trl-next
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MUTATING := .venv-mutants/.installed

.PHONY: train test test-trl-next lint format mutants notebook clean address

train: $(INSTALLED)
	$(BIN)/python train_grpo.py --config $(CONFIG) $(ARGS)

# One thread a process: two that share two cores wait for each other otherwise.
test: lint $(TESTABLE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40

# First whether that TRL is the one that is imported.
test-trl-next: $(TRL_NEXT)/.installed
	PYTHONPATH=$(TRL_NEXT) $(BIN)/python -c 'import trl; print(f"trl=={trl.__version__}")' | \
	  grep -x -f - requirements-trl-next.lock
	OMP_NUM_THREADS=1 PYTHONPATH=$(TRL_NEXT) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests/integrations/test_trl*.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mutants: $(TESTABLE) $(MUTATING)
	$(dir $(MUTATING))bin/python tests/mutants/run.py --python $(BIN)/python $(if $(MOST),--most $(MOST)) $(if $(START),--start $(START)) $(MODULES)

notebook: $(INSTALLED)
	$(BIN)/jupytext --sync notebooks/*.py

address:
	$(PYTHON) .ci/address.py $(ADDRESS)

# The stamp is written last: an installation that was cut off is taken up again.
$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "memhead needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing);" \
	    "name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@index=$$(.ci/torch_index); if [ -n "$$index" ]; then \
	  PIP_INDEX_URL="$$index" $(PIP) --no-deps --retries 1 --timeout 20 "$$(grep '^torch==' requirements.lock)" \
	  || echo "$$index does not give it: torch comes from the usual package index" >&2; fi
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --editable .
	touch $@

# Unsloth is for its tests alone: the real package, without what it needs on a GPU.
$(TESTABLE): $(INSTALLED) requirements-unsloth.lock
	$(PIP) --no-deps -r requirements-unsloth.lock
	touch $@

$(TRL_NEXT)/.installed: $(INSTALLED) requirements-trl-next.lock
	rm -rf $(TRL_NEXT)
	$(PIP) --no-deps --target $(TRL_NEXT) -r requirements-trl-next.lock
	touch $@

# Beside the other, whose packages it must not move: it only changes files and starts the tests there.
$(MUTATING): requirements-mutants.lock
	$(PYTHON) -m venv $(dir $@)
	$(dir $@)bin/python -m pip install --quiet --disable-pip-version-check -r requirements-mutants.lock
	touch $@

clean:
	rm -rf $(VENV) $(dir $(MUTATING)) .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './runs/*' -type d -prune -exec rm -rf {} +
