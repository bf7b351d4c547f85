# All paths are relative, and the tools run from .venv. So the name of the folder may have
# spaces, and another environment that is active does not matter.
PYTHON = python3
ARGS =
BIN = .venv/bin
# An editable installation warns of folders that are called as the package, and the one here is it.
PIP = PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Each file marks a finished installation, so an interrupted one starts again.
DEMO = .venv/demo-ready
BENCH = .venv/bench-ready
DEV = .venv/ready

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

install: $(DEV)  ## make the environment for all targets, .venv, with PYTHON (default: python3)

demo: $(DEMO)  ## prune a network on a small data set: make demo ARGS='--help'
	@$(BIN)/ocp-demo $(ARGS)

compare: $(DEMO)  ## repeat the paper's experiment: make compare ARGS='--dry-run'
	@$(BIN)/ocp-compare $(ARGS)

compare-widths: $(BENCH)  ## train narrow networks in three ways, at equal multiply-adds
	@$(BIN)/ocp-compare-widths $(ARGS)

compare-found: $(DEMO)  ## train with the suggestions of sparsity_find, and compare with dense
	@$(BIN)/ocp-compare-found $(ARGS)

compare-methods: $(DEMO)  ## train the methods of the field at equal budget
	@$(BIN)/ocp-compare-methods $(ARGS)

compare-sizes: $(DEMO)  ## train large and sparse networks, and small and dense ones
	@$(BIN)/ocp-compare-sizes $(ARGS)

compare-times: $(DEMO)  ## time the networks of recorded trainings after speed_up
	@$(BIN)/ocp-times $(ARGS)

bench-widths: $(DEMO)  ## time networks before and after structured pruning and its cut
	@$(BIN)/ocp-bench-widths $(ARGS)

bench: $(BENCH)  ## measure what pruning adds to a training step, for this package and fasterai
	@$(BIN)/ocp-bench $(ARGS)

bench-check: $(DEMO)  ## say what adds more to a training step than the recorded benchmark
	@$(BIN)/ocp-bench --check --rounds 3 $(ARGS)

reliability: $(DEV) $(BENCH)  ## run the situations of the tests with this package and with fasterai
	$(BIN)/python tools/reliability.py

example: $(DEMO)  ## train README's first example with five seeds, dense and pruned
	$(BIN)/python tools/first_example.py

# Notebooks run side by side, so each process has one thread. More would compete for the cores.
test outputs reliability: export OMP_NUM_THREADS = 1
# Without a GPU, Triton's interpreter runs its kernels, and it has to be chosen before Triton is imported.
ifeq ($(shell command -v nvidia-smi),)
test outputs: export TRITON_INTERPRET = 1
endif

test: $(DEV)  ## check style and spelling, run the notebooks, then the tests
	$(BIN)/ruff check
	$(BIN)/codespell
	$(BIN)/nbdev-test
	$(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile tests

prepare: $(DEV)  ## write the package and README.md from the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/readme.py

docs: $(DEV)  ## build the site from the notebooks, in _docs
	$(BIN)/python tools/docs.py

# Warnings name files of this machine, so they must not be stored in an output.
outputs: $(DEV)  ## run the notebooks, store what they print and draw, then prepare
	PYTHONWARNINGS=ignore $(BIN)/nbdev-test --save
	$(MAKE) prepare

clean:  ## remove what builds and runs leave; the environment stays
	rm -rf build dist *.egg-info _docs _proc demo .pytest_cache .hypothesis .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -exec rm -rf {} +

$(DEMO): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c "import configparser, sys; c = configparser.ConfigParser(); c.read('settings.ini'); \
	least = c['DEFAULT']['min_python']; sys.version_info >= tuple(map(int, least.split('.'))) or \
	sys.exit('Python %s or newer is needed, and $(PYTHON) is %s: make PYTHON=...' % (least, sys.version.split()[0]))"
	@echo 'Installing into .venv: 3.3 GB to download and 6.7 GB on disk, most of it CUDA, which comes with PyTorch.'
	@echo 'Without the download it took 3 to 6 minutes on two cores.'
	@$(PYTHON) -m venv .venv
	@$(PIP) --upgrade pip
	@$(PIP) --editable '.[demo]'
	@touch $@

$(BENCH): $(DEMO)
	@echo 'Installing what the benchmark compares with.'
	@$(PIP) --editable '.[bench]'
	@touch $@

$(DEV): $(DEMO)
	@echo 'Installing what the tests and the site need.'
	@$(PIP) --editable '.[dev]'
	@touch $@

.PHONY: help install demo compare compare-widths compare-found compare-methods compare-sizes compare-times bench-widths bench bench-check reliability example test prepare docs outputs clean
