.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= examples/recipes/shifts_small.yaml
ROOMS := $(shell find modeling_ilvr trainer data tasks evaluation hub_cards commands -type d -not -name '__pycache__')

.PHONY: help train test bench quality style docs

help:  ## What there is to make
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# Strict: a tree of links that editors and type checkers follow from `ilvr.trainer` to `trainer/`. A file that is added
# or removed changes its folder, and the tree is made again. Pip is upgraded: that of Python 3.11 takes a minute longer to
# choose versions.
$(BIN)/.installed: setup.py pyproject.toml constraints.txt $(ROOMS)
	test -x $(BIN)/python || $(PYTHON) -m venv --upgrade-deps $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--config-settings editable_mode=strict -e '.[dev]'
	touch $@

train: $(BIN)/.installed  ## Train, evaluate, save and reload the small model of shifts (on 2 cores)
	$(BIN)/python examples/train_ilvr.py --config $(RECIPE)

test: $(BIN)/.installed  ## Run the tests, offline
	$(BIN)/python -m pytest -n logical --dist worksteal

bench: $(BIN)/.installed  ## Measure speed and memory against the published algorithm (14 minutes on 2 slow, idle cores)
	$(BIN)/python -m benchmarks.run

quality: $(BIN)/.installed  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check

style: $(BIN)/.installed  ## Correct style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(BIN)/.installed  ## Build the documentation in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
