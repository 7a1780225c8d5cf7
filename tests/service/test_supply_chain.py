"""Pinned dependencies with hashes, and the bill of materials of a release (CycloneDX)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


FILES = {"requirements.txt": ["broker"], "requirements-test.txt": ["export", "optimum", "report", "broker", "dev"]}
"""Files of pins, and the extras that each must cover besides the plain installation."""


def pins(file):
    """Yield name, version, marker and hashes of each pin in a file."""
    text = (ROOT / file).read_text("utf-8").replace("\\\n", " ")
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        head, *hashes = re.split(r"\s+--hash=", line)
        pin, _, marker = head.partition(";")
        name, version = re.fullmatch(r"([\w.-]+)==([\w.+!]+)", pin.strip()).groups()
        yield name, version, marker.strip(), hashes


@pytest.mark.parametrize("file", FILES)
def test_every_pinned_package_has_a_hash(file):
    found = list(pins(file))
    assert len(found) > 40
    for name, version, _, hashes in found:
        assert hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), name
        assert "+" not in version, f"{name} is a build of one index"
    assert "://" not in (ROOT / file).read_text("utf-8")
    extras = [each for extra in FILES[file] for each in PROJECT["optional-dependencies"][extra]]
    wanted = {name_of(each) for each in [*PROJECT["dependencies"], *extras]} - {"edgelm"}
    assert wanted | {"setuptools"} <= {name for name, *_ in found}
    assert not [name for name, *_ in found if name.startswith(("torch", "nvidia"))], "builds differ between indexes"


@pytest.mark.parametrize("file", FILES)
def test_the_pins_agree_with_constraints_txt(file):
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    tested = dict(
        line.partition(";")[0].strip().lower().replace("_", "-").split("==") for line in lines if "==" in line
    )
    both = [(name, version, marker) for name, version, marker, _ in pins(file) if name in tested]
    assert len({name for name, *_ in both}) >= 8
    for name, version, marker in both:
        assert version == tested[name] or marker.startswith("python_full_version < '3.11'"), name


def test_the_sbom_lists_the_dependencies(tmp_path):
    tool = shutil.which("cyclonedx-py", path=str(Path(sys.executable).parent))
    if tool is None or shutil.which("make") is None:
        pytest.skip("needs make and pip install 'edgelm[dev]'")
    source = tmp_path / "edgelm"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    for name in ("edgelm", "export", "devices"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = ["make", "-s", "sbom", f"PYTHON={sys.executable}", f"CYCLONEDX={tool}"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode and re.search(r"No matching distribution|Connection|Max retries", done.stderr):
        pytest.skip(f"pip cannot reach a package registry: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    bill = json.loads((source / "dist" / "edgelm.cdx.json").read_text("utf-8"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == "edgelm"
    assert bill["metadata"]["component"]["version"] == metadata.version("edgelm")
    found = {name_of(each["name"]): each for each in bill["components"]}
    for dependency in PROJECT["dependencies"]:
        if name_of(dependency) == "tomli" and sys.version_info >= (3, 11):
            continue
        part = found[name_of(dependency)]
        assert part["purl"] == f"pkg:pypi/{name_of(dependency)}@{part['version']}"
    assert not {"pip", "setuptools", "pytest", "torch"} & set(found), "only the plain installation"
    assert str(tmp_path) not in json.dumps(bill)
