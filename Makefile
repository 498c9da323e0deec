# The environment is built once, in .venv, from the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
VERL := .venv-verl/.installed
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help env train demo test test-slow test-heads test-verl lint types docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

env: $(STAMP) ## build .venv

train: $(STAMP) ## train on two tasks in turn, entropy under control: make train ARGS="..."
	$(BIN)/isentropic train --task reversal --steps 480 --then-steps 400 $(ARGS)

demo: $(STAMP) ## the same beside plain GRPO, and the page that compares them
	$(BIN)/isentropic compare --recipes grpo isentropic --baseline grpo --tasks reversal \
	  --set steps=480 then_steps=400 --out runs/demo $(ARGS)

test: $(STAMP) ## run the tests and doctests: make test ARGS="-k entropy"
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m "not slow" $(ARGS)

test-slow: $(STAMP) ## run the tests that train a whole run: the default model, a notebook, the fault campaign, the GPU script
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m slow tests $(ARGS)

test-heads: $(STAMP) ## the TRL engine's tests under TRL's head, heads that cannot be replaced, and rare explanations
	for variant in trl fixed explain-2 explain-10; do echo "variant $$variant"; TRL_VARIANT=$$variant \
	  $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile tests/engines/trl $(ARGS) || exit 1; done

test-verl: $(VERL) ## run the tests of the verl engine, in .venv-verl
	HF_HUB_OFFLINE=1 .venv-verl/bin/python -m pytest -n auto --maxprocesses 2 --dist loadfile tests/engines/verl $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## pyrefly
	$(BIN)/pyrefly check

docs: $(STAMP) ## build the documentation into build/docs; a warning or a broken link fails it
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html -d build/doctrees docs build/docs

clean: ## remove .venv, builds and caches
	rm -rf .venv .venv-verl dist build .pytest_cache .ruff_cache .hypothesis
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "isentropic needs Python >= 3.11, got '$$($(PYTHON) -V 2>&1)'; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo 'building .venv from constraints.txt: a minute or two'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,docs,dev]'
	@touch $@

$(VERL): pyproject.toml constraints-verl.txt
	@echo 'building .venv-verl from constraints-verl.txt: a few minutes'
	@$(PYTHON) -m venv .venv-verl
	@.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-verl.txt \
	  -e '.[verl]' pytest pytest-xdist beartype
	@touch $@
