# Two commands do everything: `make train` pretrains, `make test` tests. Both first make .venv, once.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup train test test-fast gpu check docs mutations format clean

setup: $(STAMP)

# constraints.txt pins torch to a release whose CPU wheel a machine may have on disk; nothing is compiled.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing megalm and what it needs into $(VENV): a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

train: $(STAMP)
	$(BIN)/megalm prepare --corpus stdlib --tokenizer-vocab 4096 --out data/quickstart
	$(BIN)/megalm train experiment=quickstart

# In two processes, and one thread each: threads that wait for a core spin, and take it from the others.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# For every save, in two processes: the unit tests but for those that start processes, prepare data or convert models.
# Leaves out tests/dist, cli, slurm, gpu, what is marked slow, and the folders below; property tests try 10 examples.
SLOWER := launch data/prepare convert cli tools test_docs.py test_wheel.py test_api.py test_ownership.py \
          checkpoint/test_inspect_tool.py config/test_sweep.py
test-fast: $(STAMP)
	$(BIN)/python -m pytest tests/unit -m "not slow" -n 2 --dist loadfile --hypothesis-profile=fast \
	    $(SLOWER:%=--ignore=tests/unit/%)

# What a first GPU is to show: parity with the CPU, runs, and a table of speed, in under eight minutes on one.
# With the checkout's environment if there is one, else with the machine's python, whose torch is built for its GPUs.
gpu:
	$(or $(wildcard $(BIN)/python),python3) tests/gpu/run.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megalm
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/python tools/docs.py
	$(BIN)/mkdocs build --strict --quiet
	@echo "build/docs/index.html"

# Ten mistakes made on purpose, one in each package, in a copy of the checkout; each must make a test fail.
mutations: $(STAMP)
	$(BIN)/python tests/mutations.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
