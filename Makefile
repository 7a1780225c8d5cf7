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

# What the plain install consists of, and where it is written down for a release.
PLAIN ?= .venv-plain
SBOM ?= dist/edgelm.cdx.json
CYCLONEDX ?= $(TEST)/bin/cyclonedx-py
UV ?= $(TEST)/bin/uv

.PHONY: demo test requirements sbom clean

demo: $(DEMO)/ready
	$(DEMO)/bin/edgelm demo

test: $(TEST)/ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy
	$(TEST)/bin/python -m pytest

# Nothing is installed but what was tested, byte for byte; the build tool is one of the pins, so nothing else is fetched.
$(DEMO)/ready: pyproject.toml requirements.txt
	@$(check_python)
	$(call make_venv,$(DEMO))
	$(DEMO)/bin/python -m pip install -q --require-hashes --only-binary :all: -r requirements.txt
	$(DEMO)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

$(TEST)/ready: pyproject.toml constraints.txt requirements-test.txt
	@$(check_python)
	$(call make_venv,$(TEST))
	$(TEST)/bin/python -m pip install -q --require-hashes --no-deps -r requirements-test.txt
	$(TEST)/bin/python -m pip install -q -c constraints.txt torch
	$(TEST)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

compile = echo 'setuptools>=77' | $(UV) pip compile -q --universal --python-version 3.10 --generate-hashes --no-annotate \
	--custom-compile-command 'make requirements' -c constraints.txt $(1) pyproject.toml -

# The pins with hashes anew, for all Pythons and processors: after a change of pyproject.toml or constraints.txt.
# torch, and the CUDA that one of its builds brings, differ from index to index: no hash of theirs holds everywhere.
requirements:
	$(call compile,--extra broker) >requirements.txt
	$(call compile,--all-extras) | awk '/^[a-z]/ {out = /^(torch|triton|nvidia-|cuda-)/} !out' >requirements-test.txt

# A software bill of materials (CycloneDX 1.6, JSON) of the plain install, for a release.
sbom:
	$(call make_venv,$(PLAIN))
	$(PLAIN)/bin/python -m pip install -q -c constraints.txt .
	mkdir -p $(dir $(SBOM))
	sed "s/^dynamic = .*/version = \"$$($(PLAIN)/bin/edgelm --version | cut -d' ' -f2)\"/" pyproject.toml >$(PLAIN)/pyproject.toml
	$(PLAIN)/bin/python -m pip uninstall -q -y setuptools pip
	$(CYCLONEDX) environment --pyproject $(PLAIN)/pyproject.toml --mc-type application --sv 1.6 --of JSON --output-reproducible \
	  -o $(SBOM) $(PLAIN)/bin/python

clean:
	rm -rf $(DEMO) $(TEST) $(PLAIN) .venv-maker build dist *.egg-info
