# `make demo` and `make test` need Python 3.10+ with pip, make and a shell. PYTHON=... chooses the interpreter.
PYTHON ?= python3
DEMO := .venv-demo
TEST := .venv-test

# A virtual environment, also where Debian has python3 without python3-venv: then virtualenv makes it.
make_venv = $(PYTHON) -m venv $(1) 2>/dev/null || { rm -rf $(1) && \
	$(PYTHON) -m pip install -q --target .venv-maker virtualenv && \
	PYTHONPATH=.venv-maker $(PYTHON) -m virtualenv -q $(1); }

# Before pip says it in fifty lines, or installs half of it.
check_python = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	"edgelm needs Python 3.10 or newer, $(PYTHON) is %d.%d: add PYTHON=python3.11, or another" % sys.version_info[:2])'

.PHONY: demo test clean

demo: $(DEMO)/ready
	$(DEMO)/bin/edgelm demo

test: $(TEST)/ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy
	$(TEST)/bin/python -m pytest

$(DEMO)/ready: pyproject.toml constraints.txt
	@$(check_python)
	$(call make_venv,$(DEMO))
	$(DEMO)/bin/python -m pip install -q -c constraints.txt -e '.[broker]'
	touch $@

$(TEST)/ready: pyproject.toml constraints.txt
	@$(check_python)
	$(call make_venv,$(TEST))
	$(TEST)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(DEMO) $(TEST) .venv-maker build dist *.egg-info
