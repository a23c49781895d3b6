# Two commands do everything: `make book` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2
MODULES := $(shell find missingbook -name '*.py' -o -path '*_data/*' -type f)

.DEFAULT_GOAL := help
.PHONY: help setup book test lab site clean

help:   ## these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)   ## install everything into .venv (PYTHON=python3.12 picks another Python; nothing to do, nothing done)

$(STAMP): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("missingbook needs Python 3.11 or later, this is %d.%d. Try: make setup PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Installing into $(VENV): about 5 GB, a few minutes the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -e '.[dev]'
	@touch $@

book: $(STAMP) _live/tour.ipynb   ## run the tour live on real data, build the site, print where it is
	@$(BIN)/missingbook site --live _live --get-quarto

_live/tour.ipynb: nbs/tour.ipynb $(MODULES) $(STAMP)
	@$(BIN)/missingbook run tour --scale book --out _live

test: $(STAMP)   ## run every chapter and every test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -rs tests

lab: $(STAMP)   ## open the chapters in JupyterLab
	@$(BIN)/jupyter lab nbs

site: $(STAMP)   ## build the site from the stored outputs
	@$(BIN)/missingbook site --get-quarto

clean:   ## remove what was built, keep .venv
	rm -rf _proc _live _site _site.tmp build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find missingbook tests -name __pycache__ -type d -exec rm -rf {} +
