# Paths are relative, and the tools run from .venv, so that neither a folder whose
# name has spaces nor an environment that happens to be active gets in the way.
PYTHON = python3
ARGS =
BIN = .venv/bin
READY = .venv/ready

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile

install: $(READY)  ## make the environment, .venv, with PYTHON (default: python3)

demo: $(READY)  ## prune a network on a small data set: make demo ARGS='--help'
	$(BIN)/ocp-demo $(ARGS)

compare: $(READY)  ## repeat the paper's experiment: make compare ARGS='--dry-run'
	$(BIN)/ocp-compare $(ARGS)

bench: $(READY)  ## measure what pruning adds to a training step, beside the peer
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/ocp-bench $(ARGS)

reliability: $(READY)  ## hold the situations of the tests against this package and the peer
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python tools/reliability.py

# One thread a process: notebooks run side by side, and threads would fight for the cores.
test outputs reliability: export OMP_NUM_THREADS = 1

test: $(READY)  ## run the notebooks, then the tests
	$(BIN)/nbdev-test
	$(BIN)/python -m pytest -q tests

prepare: $(READY)  ## bring the package and README.md in step with the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/readme.py

docs: $(READY)  ## build the site from the notebooks, in _docs
	$(BIN)/python tools/docs.py

# Warnings name files of this machine: they have no place in a stored output.
outputs: $(READY)  ## run the notebooks, keep what they print and draw, then prepare
	PYTHONWARNINGS=ignore $(BIN)/nbdev-test --save
	$(MAKE) prepare

clean:  ## remove what builds and runs leave behind; the environment stays
	rm -rf build dist *.egg-info _docs _proc demo .pytest_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -exec rm -rf {} +

# The file marks a finished installation, so one that broke off starts again.
$(READY): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c "import configparser, sys; c = configparser.ConfigParser(); c.read('settings.ini'); \
	least = c['DEFAULT']['min_python']; sys.version_info >= tuple(map(int, least.split('.'))) or \
	sys.exit('Python %s or newer is needed, and $(PYTHON) is %s: make PYTHON=...' % (least, sys.version.split()[0]))"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.PHONY: help install demo compare bench reliability test prepare docs outputs clean
