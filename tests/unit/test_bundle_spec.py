"""edgelm/bundle/README.md specifies every key of a manifest, with its default or as required."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.bundle.manifest import (
    MANIFEST,
    BundleFile,
    KVCacheShape,
    Manifest,
    Matrix,
    StaticPrefix,
    dump_manifest,
)
from edgelm.bundle.manifest_parser import parse_manifest
from edgelm.errors import BundleError
from edgelm.graph import graph_check
from edgelm.graph.onnx_model import read_model
from edgelm.graph.shape_inference import ShapeInference
from edgelm.types import SamplingParams

SPECIFICATION = Path(__file__).parents[2] / "edgelm" / "bundle" / "README.md"
SECTIONS: dict[str, tuple[Any, str]] = {
    "Manifest": (Manifest, ""),
    "Object `cache`": (KVCacheShape, "cache"),
    "Items of `matrices`": (Matrix, "matrices"),
    "Object `sampling`": (SamplingParams, "sampling"),
    "Object `prefix`": (StaticPrefix, "prefix"),
    "Items of `files`": (BundleFile, "files"),
}
"""Class, and key of the manifest, by heading."""
EXAMPLE = Manifest(
    "llama", 64, 100, KVCacheShape("shared", 2, 1, 16), "int4", (Matrix("head", 2, 2, 32),), 1, (2,), 1000, {},
    prefix=StaticPrefix((1,), "prefix.kv", "float32", ""), files={"prefix.kv": BundleFile(0, "")},
)  # fmt: skip


def read_tables() -> Iterator[tuple[str, list[list[str]]]]:
    """Yield (heading, rows) of each section whose table has a column of defaults."""
    for section in re.split(r"^#+ ", SPECIFICATION.read_text("utf-8"), flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"]
        if rows and rows[0][:3] == ["key", "type", "default"]:
            yield section.splitlines()[0], rows[2:]


TABLES = dict(read_tables())


def test_the_specification_has_all_sections() -> None:
    assert set(TABLES) == set(SECTIONS)


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_keys_are_those_of_the_code(heading: str) -> None:
    fields = [field.name for field in dataclasses.fields(SECTIONS[heading][0])]
    assert sorted(row[0].strip("`") for row in TABLES[heading]) == sorted(fields)


@pytest.mark.parametrize(
    ("heading", "key", "default"), [(name, row[0].strip("`"), row[2]) for name, rows in TABLES.items() for row in rows]
)
def test_a_missing_key_has_the_specified_default_or_is_refused(heading: str, key: str, default: str) -> None:
    """Removes each key from a complete manifest."""
    raw = json.loads(dump_manifest(EXAMPLE))
    part = SECTIONS[heading][1]
    inner = {"": raw, "matrices": raw["matrices"][0], "files": raw["files"]["prefix.kv"]}.get(part) or raw[part]
    del inner[key]
    if default == "required":
        with pytest.raises(BundleError):
            parse_manifest(json.dumps(raw), MANIFEST)
        return
    manifest = parse_manifest(json.dumps(raw), MANIFEST)
    written = json.loads(dump_manifest(manifest))
    found = {"": written, "matrices": written["matrices"][0]}.get(part) or written[part]
    assert found[key] == json.loads(default.strip("`"))


def test_the_built_in_manifest_has_only_specified_keys() -> None:
    raw = json.loads((Path(edgelm.__file__).parent / "builtin" / MANIFEST).read_text("utf-8"))
    for heading, (_, part) in SECTIONS.items():
        found = raw if part == "" else raw.get(part)
        found = found[0] if part == "matrices" else found["model.onnx"] if part == "files" else found
        assert set(found or ()) <= {row[0].strip("`") for row in TABLES[heading]}, heading


def test_the_operators_and_inputs_of_a_graph_are_those_of_the_code() -> None:
    """Of a `shared` graph; both are tables of the code that checks graphs."""
    bundle = open_bundle("builtin")
    text = SPECIFICATION.read_text("utf-8")
    (sentence,) = re.findall(r"has no other operators than ([^.]*)\.", text)
    rules = ShapeInference(read_model(bundle.graph.read_bytes()), bundle.manifest)._rules
    assert set(re.findall(r"\w+", sentence)) - {"and"} == set(rules)
    for kind in ("shared", "growing"):
        (table,) = re.findall(rf"^\| `{kind}`: .*\n((?:\|.*\n)+)", text, re.MULTILINE)
        names = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
        assert set(names) == {*graph_check._FIXED[kind], *graph_check._OPTIONAL[kind]}
