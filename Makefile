# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint docs nightly clean

demo: $(VENV)/.installed  ## Astra on GLUE: fetch a small encoder and its rows, fine-tune, print the table
	$(BIN)/python -m lowrank_kit.assets minilm_l6 benchmark_rows
	$(BIN)/python -m lowrank_kit.run method=astra task=glue/sst2

# A process a core, of one thread each: the matrices are small, and threads that wait for each other cost minutes.
# In the order of the files, for those with few and long tests come early.
test: lint  ## everything that CI checks
	$(BIN)/python -m lowrank_kit.assets minilm_l6 smollm2_135m benchmark_rows running_text
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not nightly" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

nightly: $(VENV)/.installed  ## the full-size checks
	$(BIN)/python -m lowrank_kit.assets
	$(BIN)/python -m pytest -m nightly

docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) site build dist
