"""The security documents name a test for each promise, and these tests exist."""

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
def test_every_test_named_by_a_promise_exists(paper):
    named = set(NAME.findall((REPO / paper).read_text("utf-8")))
    assert named
    missing = named - written_tests()
    assert not missing


@pytest.mark.parametrize("paper", PAPERS)
def test_every_promise_names_a_test(paper):
    """Check the tables with the columns "promise" and "test"."""
    rows = 0
    for table in re.findall(r"\| promise \| test \|\n\|[-| ]+\|\n((?:\|.*\n)+)", (REPO / paper).read_text("utf-8")):
        for row in table.splitlines():
            rows += 1
            assert NAME.search(row), row
    assert rows
