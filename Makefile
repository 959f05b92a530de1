# Each target makes its own virtual environment when missing and installs what it needs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
WORKERS ?= 2

FUZZ_FIRST ?= 1000000
FUZZ_NUMBER ?= 2000

.PHONY: help demo test test-all fuzz dist lint bench docs notebooks clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: reinstalled only when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-examples  ## train every method on real digits: a table and a picture in out/
	$(BIN)/python -m benchmarks.compare --out out $(DEMO_ARGS)

test: $(VENV)/.installed-test  ## the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS) $(TEST_ARGS)

test-all: $(VENV)/.installed-test  ## the test suite with its exhaustive part
	$(BIN)/python -m pytest -n $(WORKERS) -m "" $(TEST_ARGS)

fuzz: $(VENV)/.installed-test  ## random chains over random trees, from seed FUZZ_FIRST on; goes on where it stopped
	$(BIN)/python -m benchmarks.fuzz --first $(FUZZ_FIRST) --number $(FUZZ_NUMBER) --json out/fuzz_$(FUZZ_FIRST).json

dist: $(BIN)/python  ## wheel and sdist in out/dist, each tried in an empty environment
	rm -rf out/dist out/tried && mkdir -p out/dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --outdir out/dist .
	for package in out/dist/*; do \
	  $(PYTHON) -m venv --clear out/tried && \
	  out/tried/bin/python -m pip install --quiet --disable-pip-version-check $$package && \
	  (cd out/tried && JAX_PLATFORMS=cpu bin/python -c "import jax.numpy as jnp, optax, flatopt; \
	    tx, w = optax.chain(flatopt.sam(0.5), optax.sgd(1.0)), jnp.array([3.0, 4.0]); \
	    u, _ = tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w); \
	    assert jnp.allclose(u, jnp.array([-3.3, -4.4])); print(flatopt.__version__, flatopt.__file__)") || exit 1; \
	done

lint: $(VENV)/.installed-lint  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-bench  ## the short form of the benchmarks: tables, and JSON in out/bench
	$(BIN)/python -m benchmarks.step_time --quick --json out/bench/step_time.json $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.memory --quick --json out/bench/memory.json
	$(BIN)/python -m benchmarks.compile_time --quick --json out/bench/compile_time.json
	$(BIN)/python -m benchmarks.whole_run --quick --json out/bench/whole_run.json $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.scaling --quick --json out/bench/scaling.json

docs: $(VENV)/.installed-docs  ## build the site into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -E -W --keep-going -b html docs docs/_build/html

notebooks: $(VENV)/.installed-docs  ## the tutorials as notebooks, in out/notebooks
	mkdir -p out/notebooks
	for page in $(filter-out %/index.md,$(wildcard docs/tutorials/*.md)); do \
	  $(BIN)/python -m jupytext --from md --to ipynb --output out/notebooks/$$(basename $$page .md).ipynb $$page; done

clean:  ## remove the virtual environment and every output
	rm -rf $(VENV) out docs/_build
