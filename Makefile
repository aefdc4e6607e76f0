# make demo    set up and run the whole loop on an embedded model and data set
# make test    set up with everything and run the tests
# make check   formatting, lint, types, import layers, doctests
#
# The dependencies are in one environment a machine. A target adds to it what is missing and what it
# needs. `.venv` in the clone is a thin environment on top of it that holds svftool itself.

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
RUN := .venv/bin/python

.PHONY: help demo test check format cov docs-check benchmark-quick clean

help:
	@sed -n 's/^# //p' Makefile | head -3

demo:
	@PYTHON="$(PYTHON)" .ci/environment --extra demo
	.venv/bin/svftool demo demo --force

test: .environment-all
	$(RUN) -m pytest $(PYTEST_ARGS)

check: .environment-all
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -c "from importlinter.cli import lint_imports_command as run; run()"
	$(RUN) -m pytest --doctest-modules svftool -q -p no:cacheprovider

format: .environment-all
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

cov: .environment-all
	$(RUN) -m pytest --cov --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

benchmark-quick: .environment-all
	$(RUN) benchmarks/decompose.py --quick --threads 1

.PHONY: .environment-all
.environment-all:
	@PYTHON="$(PYTHON)" .ci/environment --all-extras

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache demo build dist
