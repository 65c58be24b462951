# The two commands of this project are `make demo` and `make test`. Both build .venv first, once.

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/miniature

# Set for every command: one maths thread per process, and never a model hub.
test check: export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check clean

help:
	@echo 'make demo    train the miniature SDXL on generated pictures (two CPU cores, a few minutes)'
	@echo 'make test    run the whole test suite, offline'
	@echo 'make check   lint, format check and type check'
	@echo 'make clean   remove .venv, the demo pictures, its run and all caches'
	@echo 'Another Python (3.10 to 3.13):  make PYTHON=python3.12 demo'

demo: .venv/installed | demo/pictures
	$(BIN)/python src/main.py --config examples/miniature.yaml --resume auto
	@echo
	@echo "picture grid  $$(ls $(RUN)/samples/step-*.png | tail -n 1)"
	@echo "report        $(RUN)/report.html"
	@echo "checkpoint    $$(ls -d $(RUN)/checkpoints/step-* | tail -n 1)"

# More than four workers only repeat the start-up of torch; worksteal evens out long and short tests.
test: .venv/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: .venv/installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf .venv demo $(RUN) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The folder appears whole, by renaming, or not at all.
demo/pictures: | .venv/installed
	$(BIN)/sdxl-training demo-data --to $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
		echo 'Python 3.10, 3.11, 3.12 or 3.13 is needed; $(PYTHON) is none of these. Name one: make PYTHON=python3.12 ...' >&2; \
		exit 2; }
	$(PYTHON) -m venv .venv

# The sources are installed in place: only a change of pyproject.toml can ask for another installation.
.venv/installed: pyproject.toml | .venv/bin/python
	@echo 'Installing into .venv (PyTorch is large; minutes the first time) ...'
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	@echo 'Installing into .venv (PyTorch is large; minutes the first time) ...'
	$(BIN)/python -m pip install --quiet -e '.[test]'
	@touch .venv/installed $@
