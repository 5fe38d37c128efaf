# Two commands do everything: `make demo` installs and runs the main job, `make test` installs and passes the tests.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo

.PHONY: demo test lint clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("pmnet needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

# Carries a string across filler with the model in the box; then trains a small one from scratch and measures it.
demo: .venv/installed
	$(BIN)/pmnet demo models/copy-paste
	@test ! -e $(RUN) || mv $(RUN) $(RUN)-$$(date +%Y%m%d-%H%M%S)
	$(BIN)/pmnet train copy-paste --preset demo --out $(RUN)
	$(BIN)/pmnet eval retrieval $(RUN)/model --save $(RUN)

test: .venv/installed lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis
