"""Python interpreters of other versions, for tests that install edgelm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
NOT_COPIED = (".git", ".venv*", "build", "dist", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")


def run(*command, cwd, **env):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    arguments = [str(part) for part in command]
    done = subprocess.run(
        arguments, cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=1800, check=False
    )
    return done.returncode, done.stdout + done.stderr


def find_python(version):
    """Return an interpreter of the version: this one, or one on the PATH or of pyenv; else skip the test."""
    candidates = [sys.executable, shutil.which(f"python{version}")]
    pyenv = shutil.which("pyenv")
    if pyenv:
        _, root = run(pyenv, "root", cwd=REPO)
        candidates += sorted(Path(root.strip()).glob(f"versions/{version}.*/bin/python"), reverse=True)
    code = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
    for candidate in filter(None, candidates):
        exit_code, output = run(candidate, "-c", code, cwd=REPO)  # a shim of pyenv may not work
        if exit_code == 0 and output.strip() == version:
            return candidate
    pytest.skip(f"no Python {version} here: install python{version} or `pyenv install {version}`")
    return None


def copy_sources(folder):
    """Copy the repository to `folder`, so that an installation does not write into it; return the copy's path."""
    return shutil.copytree(REPO, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
