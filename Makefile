# Every target needs Python 3.10+ with pip, make and a shell. PYTHON=... selects the interpreter.
PYTHON ?= python3
DEMO := .venv-demo
TEST := .venv-test

# Make a virtual environment; on a Debian without python3-venv, with virtualenv.
make_venv = $(PYTHON) -m venv $(1) 2>/dev/null || { rm -rf $(1) && \
	$(PYTHON) -m pip install -q --target .venv-maker virtualenv && \
	PYTHONPATH=.venv-maker $(PYTHON) -m virtualenv -q $(1); }

# Fail early: pip would print fifty lines, or install some of the packages first.
check_python = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	"edgelm needs Python 3.10 or newer, $(PYTHON) is %d.%d: add PYTHON=python3.11, or another" % sys.version_info[:2])'

# The plain install, of which `make sbom` writes the bill of materials.
PLAIN ?= .venv-plain
DIST ?= dist
SBOM ?= $(DIST)/edgelm.cdx.json
CYCLONEDX ?= $(TEST)/bin/cyclonedx-py
UV ?= $(TEST)/bin/uv
DOCS_PYTHON ?= $(TEST)/bin/python

.PHONY: demo test docs dist requirements sbom clean

demo: $(DEMO)/ready
	$(DEMO)/bin/edgelm demo

test: $(TEST)/ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy
	$(TEST)/bin/python -m pytest

# Only tested files are installed, checked by their hashes; the build backend is pinned too, so that pip fetches no other.
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

# API reference (HTML), manual page and shell completion, into dist/docs, dist/man and dist/completion.
# pdoc finds only names that are set: edgelm's public names are lazy.
docs: $(if $(filter $(TEST)/bin/python,$(DOCS_PYTHON)),$(TEST)/ready)
	rm -rf $(DIST)/docs $(DIST)/man $(DIST)/completion
	mkdir -p $(DIST)/man $(DIST)/completion
	$(DOCS_PYTHON) -c 'import edgelm, pathlib, pdoc; \
	  vars(edgelm).update((name, getattr(edgelm, name)) for name in edgelm.__all__); \
	  pdoc.render.configure(docformat="numpy"); \
	  pdoc.pdoc("edgelm", "edgelm_export", "edgelm_devices", output_directory=pathlib.Path("$(DIST)/docs"))'
	$(DOCS_PYTHON) -c 'from argparse_manpage.cli import main; main()' --module edgelm.cli --function make_parser \
	  --prog edgelm --project-name edgelm --description "small language models on a board" --manual-title "edgelm manual" \
	  --version "$$($(DOCS_PYTHON) -m edgelm --version | cut -d' ' -f2)" --output $(DIST)/man/edgelm.1
	$(DOCS_PYTHON) -m edgelm completion bash >$(DIST)/completion/edgelm.bash
	$(DOCS_PYTHON) -m edgelm completion zsh >$(DIST)/completion/_edgelm

# The source distribution, and the wheel built from it.
dist: $(if $(filter $(TEST)/bin/python,$(DOCS_PYTHON)),$(TEST)/ready)
	$(DOCS_PYTHON) -m build --outdir $(DIST) .

compile = echo 'setuptools>=77' | $(UV) pip compile -q --universal --python-version 3.10 --generate-hashes --no-annotate \
	--custom-compile-command 'make requirements' -c constraints.txt $(1) pyproject.toml -

# Write the pins with hashes, for all Pythons and processors; needed after a change of pyproject.toml or constraints.txt.
# The files of torch and CUDA differ between package indexes, so their hashes are left out.
requirements:
	$(call compile,--extra broker) >requirements.txt
	$(call compile,--all-extras) | awk '/^[a-z]/ {out = /^(torch|triton|nvidia-|cuda-)/} !out' >requirements-test.txt

# The software bill of materials (CycloneDX 1.6, JSON) of the plain install, for a release.
sbom:
	$(call make_venv,$(PLAIN))
	$(PLAIN)/bin/python -m pip install -q -c constraints.txt .
	mkdir -p $(dir $(SBOM))
	sed "s/^dynamic = .*/version = \"$$($(PLAIN)/bin/edgelm --version | cut -d' ' -f2)\"/" pyproject.toml >$(PLAIN)/pyproject.toml
	$(PLAIN)/bin/python -m pip uninstall -q -y setuptools pip
	$(CYCLONEDX) environment --pyproject $(PLAIN)/pyproject.toml --mc-type application --sv 1.6 --of JSON --output-reproducible \
	  -o $(SBOM) $(PLAIN)/bin/python

clean:
	rm -rf $(DEMO) $(TEST) $(PLAIN) .venv-maker build $(DIST) *.egg-info
