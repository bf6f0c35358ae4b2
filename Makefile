# make serve   a running server with the bundled checkpoint (PORT=8000 HOST=127.0.0.1 MODEL=folder ARGS="--max-num-seqs 8")
# make test    everything set up, all tests
# make check   lint, format, types, tests, and that the documents are true
VENV  ?= .venv
HOST  ?= 127.0.0.1
PORT  ?= 8000
MODEL ?=
ARGS  ?=
# File by file in the order of their names: the shortest come last, so that no core waits long for the other.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
# Tests and servers start a hundred processes: none of them should compile qvl again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install dev serve test lint format types docs check clean

help:
	@sed -n '1,3s/^# //p' Makefile

install:
	@tools/venv.sh $(VENV)

dev:
	@tools/venv.sh $(VENV) dev

serve: install
	@exec $(VENV)/bin/qvl serve $(if $(MODEL),"$(MODEL)") --host $(HOST) --port $(PORT) $(ARGS)

lint: dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@# Nothing that Python 3.10 lacks, whatever Python this is. (--exclude: Python 2 had a name that is a field of ours.)
	$(VENV)/bin/vermin -q --no-tips --violations --target=3.10- --eval-annotations --feature fstring-pep701 --exclude long qvl tools tests

format: dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: dev
	$(VENV)/bin/mypy

docs: dev
	$(VENV)/bin/python tools/check_docs.py

test: dev
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q $(PYTEST_ARGS)

check: lint types docs test

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
