"""A wheel, installed the ways that README names into empty environments, runs; what it lacks comes by what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 300
FOLDERS = {
    "UV_TOOL_DIR": "uv",
    "UV_TOOL_BIN_DIR": "bin",
    "PIPX_HOME": "pipx",
    "PIPX_BIN_DIR": "bin",
    "XDG_CACHE_HOME": "cache",
    "EDGELM_CACHE_DIR": "cache/edgelm",
    "EDGELM_DATA_DIR": "data",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the source, so that no build lies about in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("edgelm", "export", "devices"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, timeout=LIMIT_S, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture
def shell(tmp_path: Path):
    """Run a line as a person would type it, in an environment that has nothing of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "VIRTUAL_ENV"))}
    kept |= {name: str(tmp_path / folder) for name, folder in FOLDERS.items()}
    tools = Path(sys.executable).parent  # where pip, uv and pipx are
    kept["PATH"] = os.pathsep.join([str(tmp_path / "bin"), str(tools), kept["PATH"]])

    def run(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            shlex.split(line), env=kept, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )

    return run


def test_everything_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {"edgelm": "edgelm", "export": "edgelm_export", "devices": "edgelm_devices"}
    for folder, package in packages.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix in {".py", ".toml", ".json", ".txt", ".sh", ".onnx", ".data", ".typed"}:
                assert f"{package}/{file.relative_to(ROOT / folder)}" in names


@pytest.mark.parametrize("tool", ["uv tool", "pipx"])
def test_a_tool_installs_runs_and_gets_an_extra(wheel: Path, shell, tool: str) -> None:
    pytest.importorskip(tool.split()[0], reason="needs pip install 'edgelm[dev]'")
    done = shell(f"{tool} install --python {shlex.quote(sys.executable)} {shlex.quote(str(wheel))}")
    assert done.returncode == 0, done.stderr
    done = shell("edgelm generate builtin 'play some jazz'")
    assert json.loads(done.stdout)["intent"] == "PlayMusic"
    done = shell("edgelm export nowhere out")
    assert done.returncode == 1
    (remedy,) = re.findall(r"not installed: (.*)", done.stderr)
    assert remedy == f"{tool} install --force '{wheel}[export]'"
    assert shell(remedy).returncode == 0
    done = shell("edgelm export nowhere out")
    assert "nowhere does not exist" in done.stderr


def test_pip_installs_into_an_empty_environment(wheel: Path, shell, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True, timeout=LIMIT_S)
    done = shell(f"env/bin/python -m pip install -q {shlex.quote(str(wheel))}")
    assert done.returncode == 0, done.stderr
    assert json.loads(shell("env/bin/edgelm generate builtin 'play some jazz'").stdout)["intent"] == "PlayMusic"
    for command in ("models", "list", "show smollm2-135m", "demo --help", "devices detect", "--version"):
        done = shell(f"env/bin/edgelm {command}")
        assert (done.returncode, done.stderr) == (0, ""), command
    done = shell("env/bin/edgelm demo")
    if shutil.which("mosquitto"):
        assert done.returncode == 0, done.stderr
        assert "All 3 answered" in done.stdout
    done = shell("env/bin/edgelm pull smollm2-135m --from nowhere")
    (remedy,) = re.findall(r"not installed: (.*)", done.stderr)
    assert shlex.split(remedy)[-4:] == ["-m", "pip", "install", f"{wheel}[export]"]
    assert (tmp_path / "env" / "bin") == Path(shlex.split(remedy)[0]).parent
