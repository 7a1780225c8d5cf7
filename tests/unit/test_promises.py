"""The papers on safety name a test for each promise; the tests that they name are there."""

from __future__ import annotations

import ast
import re

import pytest
from shared_data import REPO

PAPERS = ["SECURITY.md", "edgelm/mqtt/README.md"]
NAME = re.compile(r"`(test_\w+)`")


def written_tests():
    found = set()
    for file in (REPO / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
    return found


@pytest.mark.parametrize("paper", PAPERS)
def test_every_test_that_a_promise_names_is_there(paper):
    named = set(NAME.findall((REPO / paper).read_text("utf-8")))
    assert named
    missing = named - written_tests()
    assert not missing


@pytest.mark.parametrize("paper", PAPERS)
def test_every_promise_names_a_test(paper):
    """In tables whose second column is headed "test"."""
    rows = 0
    for table in re.findall(r"\| promise \| test \|\n\|[-| ]+\|\n((?:\|.*\n)+)", (REPO / paper).read_text("utf-8")):
        for row in table.splitlines():
            rows += 1
            assert NAME.search(row), row
    assert rows
