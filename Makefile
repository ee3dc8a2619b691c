# make demo: compile a real model and compare it (own environment .venv-demo, no torch)
# make test: linters, types and every test      (own environment .venv, with torch)
# make lint: the linters and types alone
#
# Only Python 3.11 or newer and make are needed. PYTHON=/path/to/python3.12 chooses another one.

CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
ifndef PYTHON
PYTHON := $(firstword $(foreach p,$(CANDIDATES),$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
endif

# Test processes side by side.
JOBS ?= 2

.PHONY: demo test lint clean

demo: .venv-demo/installed
	.venv-demo/bin/python -m benchmarks.demo

test: lint
	.venv/bin/python -m pytest -n $(JOBS)

lint: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-demo build dist demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/installed: pyproject.toml benchmarks/requirements.txt | python
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --upgrade pip
	.venv/bin/python -m pip install -q torch==2.13.0
	.venv/bin/python -m pip install -q -r benchmarks/requirements.txt -e '.[test]'
	touch $@

.venv-demo/installed: pyproject.toml | python
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install -q --upgrade pip
	.venv-demo/bin/python -m pip install -q . pillow tokenizers
	touch $@

.PHONY: python
python:
	@test -n "$(PYTHON)" || { \
		echo "no Python 3.11 or newer found: install one, or say make PYTHON=/path/to/python" >&2; \
		exit 2; }
