# `make demo` and `make test` need Python 3.10+ with pip, make and a shell. PYTHON=... chooses the interpreter.
PYTHON ?= python3
DEMO := .venv-demo
TEST := .venv-test

.PHONY: demo test check clean

demo: $(DEMO)/ready
	$(DEMO)/bin/edgelm demo

test: $(TEST)/ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy
	$(TEST)/bin/python -m pytest

check: test

$(DEMO)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install -q -c constraints.txt -e '.[cpu,broker]'
	touch $@

$(TEST)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(DEMO) $(TEST) build dist *.egg-info
