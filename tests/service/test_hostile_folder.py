"""edgelm started in an untrusted folder, such as a downloaded bundle, runs no code from that folder."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgelm
from edgelm.runtime.prepack import KERNELS
from edgelm.system import isolated_python

REPO = Path(__file__).resolve().parents[2]
PACKAGE = Path(edgelm.__file__).parent
NAMES = [
    "llvmlite",
    "numpy",
    "json",
    "numba",
    "yaml",
    "onnxruntime",
    "tokenizers",
    "llguidance",
    "jinja2",
    "paho",
    "pip",
]
NAMES += ["edgelm_devices", "sitecustomize", "usercustomize", "site", "encodings", "runpy", "importlib"]
MARK = "it-ran"

ANSWER = """
import sys; sys.path[:0] = sys.argv.pop(1).split("\\n")
from edgelm.runtime import prepack
from edgelm.cli import main
prepack.MIN_CACHED_BYTES = 0
sys.argv[0] = "edgelm"
sys.exit(main())
"""
"""The edgelm command, with prepacking enabled for bundles of any size."""


@pytest.fixture
def hostile(tmp_path):
    """A folder with the built-in bundle and hostile modules named like modules that edgelm imports."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for file in (PACKAGE / "builtin").iterdir():
        if file.suffix in {".json", ".onnx", ".data"}:
            shutil.copy(file, folder)
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / MARK)!r}, 'a').write(__name__ + ' ')\n")
    (folder / "stranger.py").write_text(f"open({str(tmp_path / MARK)!r}, 'a').write('settings ')\n")
    (folder / ".numba_config.yaml").write_text("cache_locator_classes: stranger.Locator\ndebug: 1\n")
    (folder / "pyvenv.cfg").write_text("home = .\n")
    return folder


def answer(hostile, *options, **environment):
    command = [sys.executable, "-I", "-c", ANSWER, "\n".join(isolated_python.list_import_paths()), "generate", *options]
    cache = hostile.parent / "cache"
    done = subprocess.run(
        command,
        cwd=hostile,
        env={**os.environ, "EDGELM_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    mark = hostile.parent / MARK
    assert not mark.exists(), mark.read_text()
    return done, cache


@pytest.mark.parametrize("python_path", ["", ".:relative:"])
def test_compiling_kernels_runs_nothing_from_the_current_folder(hostile, python_path):
    done, cache = answer(hostile, ".", "play some jazz", PYTHONPATH=python_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["intent"] == "PlayMusic"
    assert len(list(cache.glob(f"*/{KERNELS}"))) == 1, done.stderr


@pytest.mark.parametrize("settings", ["cache_locator_classes: stranger.Locator\ndisable_jit: 1\n", "[no yaml", "- a\n"])
def test_numba_reads_no_settings_from_the_current_folder(hostile, settings):
    (hostile / ".numba_config.yaml").write_text(settings)
    options = ("--temperature", "0.5", "--seed", "1", "--top-p", "0.9")
    done, cache = answer(hostile, ".", "play some jazz", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert list((cache / "kernels").rglob("*.nbi")), "kernels must be compiled and cached"


def test_checking_a_constraint_runs_nothing_from_the_current_folder(hostile):
    done, _ = answer(hostile, ".", "play some jazz", "--regex", "[a-z]{1,8}", "--no-cache")
    assert done.returncode == 0, done.stderr


def test_a_child_process_gets_only_absolute_import_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "relative", ".", str(tmp_path), ""]))
    paths = isolated_python.list_import_paths()
    assert paths[0] == str(PACKAGE.resolve().parent)
    assert paths[1] == str(tmp_path)
    assert all(Path(path).is_absolute() for path in paths)
    (tmp_path / "of_mine.py").write_text("import sys\ndef main():\n    return int(sys.argv[1])\n")
    assert (
        subprocess.run(isolated_python.build_python_command("of_mine", "main", "7"), check=False, timeout=60).returncode
        == 7
    )


def test_every_python_subprocess_is_isolated():
    """Code that starts Python without `edgelm.system.isolated_python` must pass -I first."""
    found = 0
    for folder in ("edgelm", "export", "devices", "examples"):
        for file in (REPO / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
                    found += 1
                    assert len(node.elts) == 1 or ast.unparse(node.elts[1]) == "'-I'", f"{file}:{node.lineno}"
    assert found >= 3, "the search must find the known places"
