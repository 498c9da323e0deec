# The environment is built once, in .venv, from the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
VERL := .venv-verl/.installed
# The TRL before the one in constraints.txt, which the TRL engine supports too.
OLDER_TRL := 1.15.0
OLDER := .venv-trl-1.15
VERL_OLD := .venv-verl-0.9.0/.installed
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help env train demo test test-slow test-heads test-versions test-verl lint types docs clean

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

test-versions: $(STAMP) $(OLDER)/.installed ## the contract with TRL and its trainers, under the newest TRL and the one before
	for env in .venv $(OLDER); do $$env/bin/python -c 'import trl; print("trl", trl.__version__)'; HF_HUB_OFFLINE=1 \
	  $$env/bin/python -m pytest -q -n auto --maxprocesses 2 --dist loadfile tests/engines/trl/test_compat.py \
	  tests/engines/trl/test_trl_control.py tests/engines/trl/trainers $(ARGS) || exit 1; done

test-verl: $(VERL) ## run the tests of the verl engine, in .venv-verl
	HF_HUB_OFFLINE=1 .venv-verl/bin/python -m pytest -n auto --maxprocesses 2 --dist loadfile tests/engines/verl $(ARGS)

.PHONY: test-verl-versions
test-verl-versions: $(VERL_OLD) ## run the contract tests of the verl engine and some of its worker with the oldest verl that is let in
	HF_HUB_OFFLINE=1 $(dir $(VERL_OLD))bin/python -m pytest tests/engines/verl/test_verl_compat.py \
	  tests/engines/verl/test_verl_worker.py -k "verl_compat or shaping_off or resumed_worker or data_that_went_in" $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## pyrefly
	$(BIN)/pyrefly check

docs: $(STAMP) ## build the documentation into build/docs; a warning or a broken link fails it
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html -d build/doctrees docs build/docs

clean: ## remove .venv, builds and caches
	rm -rf .venv .venv-verl $(OLDER) .venv-verl-0.9.0 dist build .pytest_cache .ruff_cache .hypothesis
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

# verl 0.9.0 has no extra that brings what its worker imports.
$(VERL_OLD): pyproject.toml constraints-verl.txt
	@echo 'building $(@D) from constraints-verl.txt, with another verl: a few minutes'
	@$(PYTHON) -m venv $(@D)
	@echo '*' > $(@D)/.gitignore
	@sed 's/^verl==.*/verl==0.9.0/' constraints-verl.txt > $(@D)/constraints.txt
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt \
	  -e '.[verl]' uvicorn fastapi cachetools TransferQueue pytest pytest-xdist beartype
	@touch $@

$(OLDER)/.installed: pyproject.toml constraints.txt
	@echo 'building $(OLDER) from constraints.txt with trl $(OLDER_TRL): a few minutes'
	@$(PYTHON) -m venv $(OLDER)
	@echo '*' > $(OLDER)/.gitignore
	@sed 's/^trl==.*/trl==$(OLDER_TRL)/' constraints.txt > $(OLDER)/constraints.txt
	@$(OLDER)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDER)/constraints.txt \
	  -e '.[trl,cli,report]' pytest pytest-xdist beartype
	@touch $@
