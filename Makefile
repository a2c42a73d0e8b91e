# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)
# Two cores are better used by two processes of one thread than by threads waiting for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow check fmt nano clean
demo: $(VENV)/.base  ## set up without torch, then let the packaged model think and answer
	@$(BIN)/gptoss generate -p "What is 247 + 385?" --effort high --temperature 0
	@$(BIN)/gptoss generate -q -p "How many times does the letter r occur in strawberry?" --temperature 0
	@$(BIN)/gptoss generate -q -p "Who are you?" --effort low --temperature 0

test: $(VENV)/.dev  ## the default suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev  ## full-size checkpoints and long texts: 30 GB of disk, 12 GB of memory
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev  ## what must be clean before a commit
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

nano: $(VENV)/.dev  ## train the packaged model from nothing, over an hour on two cores
	bash runs/train_nano.sh

clean:
	rm -rf build dist $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gptoss needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

# An editable install: sources are read where they lie, the compiled part is built once.
$(VENV)/.base: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
