# make demo    set up, fetch a small model, answer a prompt
# make test    set up for development, run the tests
# make check   ruff and mypy (make format repairs what ruff can)
# make bench   decode and prefill against llama-bench, in alternation: LLAMA_BENCH=PATH [MODELS="a.gguf b.gguf"]
# make goldens rewrite the outputs that tests compare with
#
# Another interpreter: make PYTHON=python3.12 demo. The model and compiled kernels go to
# $COTERIE_HOME, else to the user's cache folder.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test check format bench goldens clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUESTION ?= Explain in one sentence why the sky is blue.

# Of pip's lines only the large downloads: the rest is for whoever runs pip himself.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
SHOW = sed -Eun -e 's/^ *Downloading ([^ ]*\/)?([A-Za-z0-9_.]+)-[0-9].*\(([0-9.]+ MB)\).*/    \2 \3/p' \
       -e 's/^Installing collected packages.*/    unpacking/p'

demo: $(VENV)/.base
	@echo '$$ coterie pull smollm2'
	@$(BIN)/coterie pull smollm2
	@echo '$$ coterie run smollm2 --temp 0 -p "$(QUESTION)"'
	@$(BIN)/coterie run smollm2 --temp 0 -p "$(QUESTION)"

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.base
	$(BIN)/python benchmarks/in_memory.py $(MODELS)

goldens: $(VENV)/.dev
	$(BIN)/python tests/goldens.py

clean:
	rm -rf $(VENV) build dist

$(VENV)/.base: pyproject.toml constraints.txt
	@PYTHONPATH=src $(PYTHON) -m coterie.startup
	@echo "Setting up $(VENV): downloads 230 MB, takes 800 MB of disk, half a minute or more"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e . | $(SHOW)
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "Adding the tools of development, and runtimes that stand in for GPUs and NPUs: 250 MB more"
	@$(INSTALL) -e '.[dev]' | $(SHOW)
	@touch $@
