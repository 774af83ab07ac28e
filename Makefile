# make demo   from nothing to a trained small model and its pictures
# make test   from nothing to all tests passed
# make test-full   every test, with what make test leaves out: every attack, the backward pass of every choice compiled,
#   sharded twins of tests with two processes, and weights of XL; hours on two cores
# make test-eval   from nothing to the feature networks compared with torch-fidelity (an environment of its own)
# make docs   from nothing to the documentation site in build/site; a dead link or a public name without text fails
# make test-docs   runs every command of the tutorials and how-to pages, with small budgets, the notebooks, and the page of
#   `dit-in-dit app` in Chromium (an environment of its own)
# make test-oldest  from nothing to the tests with the oldest versions that pyproject.toml names (an environment of its own)
# make test-track  from nothing to runs told to Weights & Biases, trackio and MLflow, offline (an environment of its own)
# make release   source archive and wheel in dist/, checked: files, size below 60 MB, texts (the list before it: CONTRIBUTING.md)
# make device-check   on a GPU, in nine minutes: right, limits, speed (docs/gpu.md); PYTHON=python3 has the PyTorch that is used
# Paths are relative and the scripts of .venv are not used, so that a space in the folder's name does no harm.

PYTHON ?= python3
RUN := .venv/bin/python

DEVICE_OUT ?= runs/device-check

.PHONY: demo device-check test test-docs test-eval test-lora test-track test-oldest test-full check lint release docs
.DELETE_ON_ERROR:

demo: .venv/core
	$(RUN) -m dit_in_dit demo --out runs/demo

# A process for each core and one thread in each: hardly a test can use more. mypy is one of the tests.
FILES := -n auto --dist loadfile

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(FILES)

test-full: .venv/dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest --full $(FILES) --timeout 900

# The page's packages, and a browser's driver: apart from dev, which needs neither. The browser is the system's Chromium.
APP := .venv-app/bin/python

test-docs: .venv-app/made
	OMP_NUM_THREADS=1 $(APP) -m pytest -m docs tests/test_docs_run.py tests/test_notebook.py -n auto --timeout 900
	OMP_NUM_THREADS=1 $(APP) -m pytest -m docs tests/test_app_page.py --timeout 400

.venv-app/made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-app
	$(APP) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,app]' playwright
	touch $@
# The site's packages need nothing of dev, and dev nothing of them.
DOCS := .venv-docs/bin/python

docs: .venv-docs/made
	NO_MKDOCS_2_WARNING=1 $(DOCS) -m mkdocs build --strict --site-dir build/site

.venv-docs/made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	$(DOCS) -m pip install --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# With the PyTorch that is there, not that of .venv: it fits the driver.
device-check:
	PYTHONPATH=src $(PYTHON) -m dit_in_dit.benchmark.device --seconds 520 --out $(DEVICE_OUT)

release: .venv-release/made
	rm -rf dist
	.venv-release/bin/python -m build
	.venv-release/bin/twine check --strict dist/*
	test "$$(find dist -name '*.whl' -size -60M | wc -l)" -eq 1

.venv-release/made: pyproject.toml
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install --disable-pip-version-check build twine
	touch $@

lint: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

check: lint
	$(RUN) -m mypy

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ .venv/core

# The feature networks' packages, against their own numbers: apart, because what they need breaks others (docs/decisions/dependencies.md).
EVAL := .venv-eval/bin/python

test-eval: .venv-eval/made
	OMP_NUM_THREADS=1 $(EVAL) -m pytest tests/eval

.venv-eval/made: pyproject.toml constraints.txt tests/eval/constraints.txt
	$(PYTHON) -m venv .venv-eval
	$(EVAL) -m pip install --disable-pip-version-check -c constraints.txt -c tests/eval/constraints.txt \
		-e '.[viz]' pytest pytest-timeout transformers
	$(EVAL) -m pip install --disable-pip-version-check -c tests/eval/constraints.txt --no-deps torch-fidelity torchvision
	touch $@

# peft brings transformers and accelerate: apart from dev, because diffusers imports them wherever they are.
LORA := .venv-lora/bin/python

test-lora: .venv-lora/made
	OMP_NUM_THREADS=1 $(LORA) -m pytest tests/test_tools.py

.venv-lora/made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lora
	$(LORA) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,lora]'
	touch $@

# Trackers that bring many packages: apart from dev, so that nothing else has to agree with them.
TRACK := .venv-track/bin/python

test-track: .venv-track/made
	OMP_NUM_THREADS=1 $(TRACK) -m pytest tests/test_track.py

.venv-track/made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-track
	$(TRACK) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(TRACK) -m pip install --disable-pip-version-check wandb trackio mlflow
	touch $@

# PyPI's oldest PyTorch for Linux is built for CUDA, several GB; it runs on a CPU as well. Types are those of today's packages.
OLDEST := .venv-oldest/bin/python

test-oldest: .venv-oldest/made
	OMP_NUM_THREADS=1 $(OLDEST) -m pytest $(FILES) --ignore tests/test_types.py

.venv-oldest/made: pyproject.toml tests/oldest/constraints.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install --disable-pip-version-check -c tests/oldest/constraints.txt -e '.[dev]'
	touch $@
