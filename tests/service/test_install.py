"""Installation into empty environments by the commands in README, and by those that errors about extras name."""

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
from interpreters import find_python

import edgelm
from edgelm.cli import COMMANDS

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


README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_line(tool: str) -> str:
    (line,) = re.findall(rf"^{tool} install .*$", README, re.MULTILINE)
    return str(line)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without build outputs."""
    source = tmp_path_factory.mktemp("clone") / "edgelm"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("edgelm", "export", "devices"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(clone)]
    subprocess.run(command, check=True, timeout=LIMIT_S, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture
def shell(tmp_path: Path):
    """Run a command line in an environment without this checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "VIRTUAL_ENV"))}
    kept |= {name: str(tmp_path / folder) for name, folder in FOLDERS.items()}
    tools = Path(sys.executable).parent  # pip, uv and pipx
    kept["PATH"] = os.pathsep.join([str(tmp_path / "bin"), str(tools), kept["PATH"]])

    def run(line: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        words = shlex.split(line, comments=True)
        return subprocess.run(words, env=kept, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    return run


def test_everything_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {"edgelm": "edgelm", "export": "edgelm_export", "devices": "edgelm_devices"}
    for folder, package in packages.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix in {".py", ".toml", ".json", ".txt", ".sh", ".onnx", ".data", ".typed"}:
                assert f"{package}/{file.relative_to(ROOT / folder)}" in names


@pytest.mark.parametrize("tool", ["uv tool", "pipx", "pip"])
def test_the_install_command_of_readme_installs_everything(clone: Path, shell, tmp_path: Path, tool: str) -> None:
    if tool == "pip":
        subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True, timeout=LIMIT_S)
        (tmp_path / "bin").symlink_to(tmp_path / "env" / "bin")  # as activating the environment
    else:
        pytest.importorskip(tool.split()[0], reason="needs pip install 'edgelm[dev]'")
    done = shell(readme_line(tool), clone)
    if done.returncode and re.search(r"[Ff]ailed to fetch|dns error|error sending request", done.stderr):
        pytest.skip(f"{tool} cannot reach a package registry: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    done = shell("edgelm generate builtin 'play some jazz'")
    assert json.loads(done.stdout)["intent"] == "PlayMusic"
    assert "nowhere does not exist" in shell("edgelm pull mine --from nowhere").stderr  # the exporter is installed
    done = shell("edgelm demo --embedded-broker")
    assert "All 3 answered" in done.stdout, done.stderr


def test_a_tool_without_an_extra_names_the_command_to_install_it(wheel: Path, shell) -> None:
    pytest.importorskip("uv", reason="needs pip install 'edgelm[dev]'")
    done = shell(f"uv tool install {shlex.quote(str(wheel))}")
    if done.returncode and re.search(r"[Ff]ailed to fetch|dns error|error sending request", done.stderr):
        pytest.skip(f"uv cannot reach a package registry: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    done = shell("edgelm export nowhere out")
    assert done.returncode == 1
    (remedy,) = re.findall(r"not installed: (.*)", done.stderr)
    assert remedy == f"uv tool install --force '{wheel}[export]'"
    assert shell(remedy).returncode == 0
    assert "nowhere does not exist" in shell("edgelm export nowhere out").stderr


def test_the_source_distribution_builds_the_same_wheel(wheel: Path, clone: Path, tmp_path: Path) -> None:
    pytest.importorskip("build", reason="needs pip install 'edgelm[dev]'")
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(clone)]  # the sdist, and a wheel from it
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode and re.search(r"No matching distribution|Connection|Max retries", done.stdout + done.stderr):
        pytest.skip("pip cannot reach a package registry")
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert list(tmp_path.glob("*.tar.gz"))
    first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(built)
    assert built.name == wheel.name
    contents = [
        {name: file.read(name) for name in file.namelist() if not name.endswith((".dist-info/RECORD", "/WHEEL"))}
        for file in (first, second)
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("version", ["", "3.12"], ids=["this Python", "3.12"])
def test_pip_installs_into_an_empty_environment(wheel: Path, shell, tmp_path: Path, version: str) -> None:
    """`test_interpreters.py` installs into Python 3.10 and 3.13."""
    python = find_python(version) if version else sys.executable
    subprocess.run([python, "-m", "venv", tmp_path / "env"], check=True, timeout=LIMIT_S)
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


def test_make_docs_writes_reference_manual_page_and_completion(tmp_path: Path) -> None:
    for module in ("pdoc", "argparse_manpage", "shtab"):
        pytest.importorskip(module, reason="needs pip install 'edgelm[dev]'")
    command = ["make", "-s", "docs", f"DOCS_PYTHON={sys.executable}", f"DIST={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    reference = (tmp_path / "docs" / "edgelm.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in reference for name in edgelm.__all__ if name != "__version__")
    manual = (tmp_path / "man" / "edgelm.1").read_text(encoding="utf-8")
    assert all(rf"\fI\,'edgelm {command}'\/\fR" in manual for command in COMMANDS)
    assert str(Path.home()) not in manual
    assert "max-batch" in (tmp_path / "completion" / "edgelm.bash").read_text(encoding="utf-8")
