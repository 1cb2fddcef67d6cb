# The two commands of a newcomer are `make demo` and `make test`. What they need is made once: .venv, packages, made-up logs.
#   make demo   train and evaluate on made-up logs, print scores and where report, film and weights are
#   make test   modules in step with notebooks, code style, notebooks run, README current, pytest     FLAGS="gpu data" runs those cells too
#   make notebook NB=22_scene   that one notebook, tested as make test does
#   make docs   the site, in _docs/           make lab     JupyterLab on the notebooks     LAB="--no-browser --port 9000" is passed on
#   make export modules from notebooks        make readme  README.md from nbs/00_index.ipynb, tables
#   make record RUN=name   add a run's small files to git      make clean   remove what was made, except .venv and runs
#   make times  what the last make test took becomes the line at the head of each notebook
# PYTHON=/path/to/python uses that interpreter as it is and makes no .venv. TORCH="torch==2.13.0 --index-url ..." chooses the build.
# Without a GPU PyTorch's own index is asked first: its build for CPUs is 0.2 GB, the usual one brings 3 GB of CUDA.

# MALLOC_...: memory that was freed is kept by glibc and used again, a tenth less time on a CPU.
# GLIBC_TUNABLES: large pages for it, a twentieth less (glibc 2.35 and later; others do not read it).
# PYTHONDONTWRITEBYTECODE: emptied, so that a hundred short processes need not each compile the package's modules.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test notebook times docs lab export readme record clean
.DELETE_ON_ERROR:

BASE_PYTHON ?= python3
TORCH ?= torch==2.13.0
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
FLAGS ?=
OUTPUTS ?=
WORKERS ?= 2
ifndef PYTHON
PYTHON := .venv/bin/python
READY := .venv/.ready
READY_DOCS := .venv/.ready-docs
endif

REPO = $(PYTHON) -c "import sys; from flux4d.repo import repo_main; sys.exit(repo_main())"
CITY = $(PYTHON) -c "import sys; from flux4d.city import city_main; sys.exit(city_main())"
PIP = .venv/bin/python -m pip install -qq --disable-pip-version-check --root-user-action=ignore
DEMO := papermill_runs/demo
CITY_PARAMS ?= --logs 3 --frames 50 --scale 0.25 --seed 0
DEMO_PARAMS ?= -p data_root data/city -p out_dir $(DEMO) -p preset draft -p image_scale 0.5 -p iters 65 -p minutes 2 -p eval_every 0 -p save_renders 1

help:
	@sed -n '2,8s/^# *//p' Makefile

.venv/.ready: pyproject.toml
	@echo "making .venv: once, a few minutes"
	@$(BASE_PYTHON) -m venv .venv || { echo "no virtual environment could be made: apt-get install python3-venv"; exit 1; }
	@if [ "$(origin TORCH) $$(uname -s)" = "file Linux" ] && ! command -v nvidia-smi >/dev/null && \
	  $(BASE_PYTHON) -c "import urllib.request as u; u.urlopen('$(CPU_INDEX)/torch/', timeout=10)" 2>/dev/null && \
	  $(PIP) $(TORCH) --index-url $(CPU_INDEX); then echo "no GPU here: PyTorch for CPUs"; else $(PIP) $(TORCH); fi
	@$(PIP) $(TORCH) -e '.[dev]'
	@touch $@

.venv/.ready-docs: .venv/.ready
	@$(PIP) -e '.[docs]'
	@touch $@

demo: export OMP_NUM_THREADS := 1
demo: export NUMBA_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 1)
demo: $(READY)
	@if $(MAKE) -q $(DEMO)/metrics.json; then $(REPO) brief $(DEMO) | sed 's|DATA_ROOT|data/city|'; else $(MAKE) --no-print-directory $(DEMO)/metrics.json; fi

$(DEMO)/metrics.json: nbs/60_stage6.ipynb $(wildcard flux4d/*.py flux4d/*/*.py) | $(READY)
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@$(CITY) data/city $(CITY_PARAMS)
	@JUPYTER_PATH=$(CURDIR)/docs/lab $(PYTHON) -m papermill nbs/60_stage6.ipynb $(DEMO)/60_stage6.ipynb \
	  --no-progress-bar --log-level WARNING -k python3 $(DEMO_PARAMS)

test: export OMP_NUM_THREADS := 1
test demo: export MALLOC_TRIM_THRESHOLD_ := 2147483648
test demo: export MALLOC_MMAP_THRESHOLD_ := 2147483648
test demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
test demo: export PYTHONDONTWRITEBYTECODE :=
test: $(READY)
	@mkdir -p build
	$(PYTHON) -m ruff check --quiet nbs tests
	$(REPO) check
	@echo "cells flagged gpu, slow or data run only when asked for (FLAGS='gpu data'); asked for: $(or $(FLAGS),none)"
	$(PYTHON) -c "from nbdev.test import nbdev_test; nbdev_test(n_workers=$(WORKERS), flags='$(FLAGS)', timing=True)" | tee build/tests.txt
	$(PYTHON) -m pytest -q -rs -n $(WORKERS) --dist loadfile --no-loadscope-reorder

notebook: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -c "from nbdev.test import nbdev_test; nbdev_test('nbs/$(NB).ipynb', n_workers=0, flags='$(FLAGS)', timing=True)"

times: $(READY)
	$(REPO) times build/tests.txt

docs: $(READY_DOCS) $(READY)
	@rm -rf _docs
	$(REPO) pages build/pages
	$(PYTHON) -m sphinx -b html -q -W --keep-going -j $(WORKERS) -d build/doctrees -c docs/site build/pages _docs
	$(REPO) site _docs
	@echo "the site is in _docs/: open _docs/index.html"

lab: $(READY)
	JUPYTER_CONFIG_PATH=$(CURDIR)/docs/lab OUTPUTS=$(OUTPUTS) $(PYTHON) -m jupyterlab nbs $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

export: $(READY)
	$(PYTHON) -c "from nbdev.doclinks import nbdev_export; nbdev_export(path=None)"
	$(PYTHON) -c "from nbdev.clean import nbdev_clean; nbdev_clean(fname=None)"

readme: $(READY)
	$(REPO) readme

record: $(READY)
	@files=$$($(REPO) record papermill_runs/$(RUN)) || { echo "$$files"; exit 1; }; git add -f $$files

clean:
	rm -rf _docs _proc build dist .pytest_cache .ruff_cache .cache data/city $(DEMO) *.egg-info
	find nbs flux4d tests -name __pycache__ -o -name .ipynb_checkpoints | xargs -r rm -rf
