"""The runtime, installed without extras, on the oldest and the newest supported Python.

A Jetson with JetPack 6 has Python 3.10 and onnxruntime 1.23.2.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from interpreters import copy_sources, find_python, run

REPO = Path(__file__).resolve().parents[2]
PAIRS = {"3.10": "onnxruntime==1.23.2", "3.13": "onnxruntime"}
ALL = ["tests/unit", "tests/property", "--ignore=tests/unit/test_readme.py"]
QUICK = ["tests/unit/test_model.py", "tests/unit/test_worker.py", "tests/unit/test_worker_failures.py"]
QUICK += ["tests/property/test_engine_properties.py"]


def check(version, source, home, bundles):
    """Install into `home` and run tests there on each bundle. Skips or fails like a test."""
    python = find_python(version)
    code, output = run(python, "-m", "venv", home, cwd=source)
    if code:
        pytest.skip(f"{python} cannot make a virtual environment: {output.strip().splitlines()[-1]}")
    pip = [home / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
    code, output = run(*pip, "pytest>=8", "hypothesis>=6", "psutil>=6", cwd=source)
    if code:
        pytest.skip(f"pip cannot reach a package registry: {output.strip().splitlines()[-1]}")
    code, output = run(*pip, PAIRS[version], source, cwd=source)
    assert code == 0, output
    # the pytest script does not add the working directory to the path, so the installed package is tested
    for quant, tests in (("fp32", ALL), ("int4", QUICK)):
        given = {
            "EDGELM_TEST_BUNDLE": str(bundles[quant]),
            "EDGELM_SHARED": os.environ.get("EDGELM_SHARED") or str(REPO.parent / "shared"),
        }
        code, output = run(home / "bin" / "pytest", "-q", "--hypothesis-profile=few", *tests, cwd=source, **given)
        assert code == 0, output[-5000:]
        passed = re.search(r"(\d+) passed", output)
        assert passed, output[-5000:]
        assert int(passed[1]) >= (200 if quant == "fp32" else 40), output[-5000:]


@pytest.fixture(scope="module")
def checks(tmp_path_factory, tiny_checkpoint, export_to_cache):
    """The checks of all versions, run in parallel, each in a copy of the sources."""
    checkpoint = tiny_checkpoint(tied=False)
    bundles = {quant: export_to_cache(checkpoint, quant=quant) for quant in ("fp32", "int4")}
    with ThreadPoolExecutor(len(PAIRS)) as pool:
        running = {}
        for version in PAIRS:
            folder = tmp_path_factory.mktemp("python")
            source = copy_sources(folder / "edgelm")
            running[version] = pool.submit(check, version, source, folder / "venv", bundles)
        yield running


@pytest.mark.parametrize("version", PAIRS)
def test_the_runtime_works_on_python(version, checks):
    checks[version].result()
