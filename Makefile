# The two commands of the README: `make demo` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extra pip arguments for torch alone, e.g. an index of CPU builds.
PIP_TORCH_ARGS ?=

# Without byte code every process compiles our modules anew, and tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all check format bench clean
help:  ## This list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "wbdist needs Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone, pinned: an unpinned torch pulled in by another package is gigabytes of CUDA.
$(VENV)/.base: constraints.txt pyproject.toml hatch_build.py wbdist/run/_packing.c | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,server,examples]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,server,s3,examples,dev]'
	@touch $@

demo: $(VENV)/.base  ## Train, preempt, kill, resume; compare with an uninterrupted run. About a minute after the install.
	@$(BIN)/python examples/demo.py

# Four workers on two cores: tests wait for other processes as often as they compute.
test: $(VENV)/.dev  ## The test-suite (under 10 minutes on 2 cores).
	$(BIN)/python -m pytest -n 4 --dist loadfile -m "not slow"

test-all: $(VENV)/.dev  ## Everything, with the long fault and soak tests; property tests look for new examples.
	HYPOTHESIS_PROFILE=search $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.dev  ## Lint, format, strict types, import layers, declared dependencies.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/deptry wbdist

format: $(VENV)/.dev  ## Reformat and apply safe fixes.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev  ## The benchmarks, against peers, in one run each.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@for b in benchmarks/*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

clean:  ## Remove what was built and what the demo left (stops the demo's server first).
	-@$(BIN)/wbdist server stop --data-dir demo-out/server 2>/dev/null
	rm -rf $(VENV) demo-out ui/node_modules wbdist/server/ui/static
