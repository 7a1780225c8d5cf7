"""The lowest versions that pyproject.toml allows, installed together; commands and tests run with them."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest
from interpreters import REPO, copy_sources, find_python, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TESTS = ["tests/unit/test_model.py", "tests/unit/test_codecs.py", "tests/property/test_bundle_properties.py"]
OFFLINE = re.compile(r"[Ff]ailed to fetch|dns error|error sending request|No solution found.*network", re.DOTALL)


def bounds():
    """Return the lower bounds of each direct dependency of `edgelm[export]`: several if they depend on markers."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
    found: dict[str, set[str]] = {}
    for line in [*project["dependencies"], *project["optional-dependencies"]["export"]]:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)(;.*)?", line).groups()[:2]
        found.setdefault(name.replace("_", "-"), set()).add(bound)
    return found


def test_every_dependency_has_a_lower_bound():
    assert {"jinja2", "onnxruntime", "numba", "onnx"} <= set(bounds())
    assert bounds()["jinja2"] == {"3.1.6"}
    assert bounds()["onnxruntime"] == {"1.24.4", "1.23"}


@pytest.mark.parametrize("version", ["3.10", "3.11"])
def test_the_lowest_versions_work_together(version, tmp_path, tiny_checkpoint, export_to_cache):
    pytest.importorskip("uv", reason="needs pip install 'edgelm[dev]'")
    python = find_python(version)
    source = copy_sources(tmp_path / "edgelm")
    venv, lowest = tmp_path / "venv", tmp_path / "lowest.txt"
    uv = [sys.executable, "-m", "uv", "--no-python-downloads", "pip"]
    inside = ["--python", venv / "bin" / "python"]
    code, output = run(
        sys.executable, "-m", "uv", "venv", "-q", "--no-python-downloads", "--python", python, venv, cwd=source
    )
    assert code == 0, output
    compiled = [*uv, "compile", "-q", *inside, "--resolution", "lowest-direct", "--extra", "export", "-o", lowest]
    code, output = run(*compiled, "pyproject.toml", cwd=source)
    if code and OFFLINE.search(output):
        pytest.skip(f"uv cannot reach a package registry: {output.strip().splitlines()[-1]}")
    assert code == 0, output
    for what in (["-r", lowest], ["pytest>=8", "hypothesis>=6"], ["--no-deps", source]):
        code, output = run(*uv, "install", "-q", *inside, *what, cwd=source)
        assert code == 0, output

    code, output = run(*uv, "list", "-q", *inside, "--format", "json", cwd=source)
    installed = {each["name"]: each["version"] for each in json.loads(output)}
    for name, allowed in bounds().items():
        if name != "tomli" or version == "3.10":
            assert any(f"{installed[name]}.0.0".startswith(f"{bound}.") for bound in allowed), (name, installed[name])

    home = {"EDGELM_CACHE_DIR": str(tmp_path / "cache"), "EDGELM_TEST_CACHE": os.environ.get("EDGELM_TEST_CACHE", "")}
    home = {name: value for name, value in home.items() if value}
    edgelm = venv / "bin" / "edgelm"
    code, output = run(
        edgelm, "generate", "builtin", "play some jazz", "--temperature", "0.1", "--seed", "1", cwd=tmp_path, **home
    )
    assert (code, json.loads(output)["intent"]) == (0, "PlayMusic")
    code, output = run(edgelm, "devices", "smoke", "--json", cwd=tmp_path, **home)
    report = json.loads(output)
    assert report["ok"], output
    (kernels,) = [check for check in report["checks"] if check["name"] == "kernels"]
    assert kernels["status"] == "ok" or "this processor has neither" in kernels["detail"], kernels
    bundle = export_to_cache(tiny_checkpoint(tied=False), quant="fp32")
    tests = [venv / "bin" / "pytest", "-q", "--hypothesis-profile=few", *TESTS]
    code, output = run(*tests, cwd=source, EDGELM_TEST_BUNDLE=str(bundle), **home)
    assert code == 0, output[-5000:]
    assert int(re.search(r"(\d+) passed", output)[1]) > 100, output[-2000:]
