# Everything happens in .venv, which is made when it is needed. Needs Python 3.11 or later, pip and make.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

help:            ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(READY)   ## run the whole way of a message, in real processes
	@$(BIN)/lamsonq demo

test: $(READY)   ## run the tests; make test ARGS="-m slow" the long ones
	@$(BIN)/pytest $(ARGS)

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lamsonq config app tests

bench: $(READY)  ## ours and the peers: make bench ROWS="engine spool", make bench BENCH=full
	@BENCH=$(BENCH) $(BIN)/python -m tests.bench $(ROWS)

FUZZ_SECONDS ?= 600

fuzz: $(READY)   ## look for what breaks sessions and messages, FUZZ_SECONDS=600 in all
	$(BIN)/pip install --quiet --disable-pip-version-check -c .github/constraints.txt -e '.[fuzz]'
	$(BIN)/python tests/fuzz/run.py session $$(($(FUZZ_SECONDS) / 2))
	$(BIN)/python tests/fuzz/run.py mail $$(($(FUZZ_SECONDS) / 2))

$(READY): pyproject.toml .github/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c .github/constraints.txt -e '.[dev]'
	@touch $@

.PHONY: help demo test check bench fuzz
