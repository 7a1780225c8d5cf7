"""Environments of services and containers: no home, no cache, a read-only installation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgelm
from edgelm.bundle.store import BundleStore
from edgelm.system import user_folders
from edgelm.system.board_cache import BoardCache

NOBODY = 61_234
"""A user id that is not in the user database."""


HOMELESS = "import pwd\ndef nobody(_): raise KeyError\npwd.getpwuid = nobody\n"
"""Code that removes this process's user from the user database."""


def is_open(*places):
    """Whether other users can read all of these paths."""
    return all(Path(each).stat().st_mode & 0o005 == 0o005 for place in places for each in (place, *Path(place).parents))


def run_edgelm(*arguments, environment, text=None):
    """Run the command line without a home; as another user if we are root and Python is readable for all."""
    code = HOMELESS
    if os.geteuid() == 0 and is_open(sys.prefix, sys.base_prefix, Path(edgelm.__file__).parent):
        code += f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    code += "import sys; sys.argv[0] = 'edgelm'; from edgelm.cli import main; sys.exit(main())"
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        input=text,
        timeout=240,
        check=False,
        cwd="/",
    )


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"EDGELM_CACHE_DIR": "/proc/nowhere"},
        {"EDGELM_CACHE_DIR": "/dev/null/cache", "EDGELM_DATA_DIR": "/dev/null/data"},
        {"HOME": "/nonexistent"},
        {"HOME": "", "XDG_CACHE_HOME": "relative"},
        {"EDGELM_SERVICE_PORT": "80", "HOME": "/"},
    ],
    ids=repr,
)
def test_a_user_without_folders_gets_a_completion(environment):
    done = run_edgelm("generate", "builtin", "play some jazz", environment=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["intent"] == "PlayMusic"
    assert len(done.stderr.splitlines()) <= 1, done.stderr
    for command in (["list"], ["models"], ["cache"], ["info", "builtin"]):
        done = run_edgelm(*command, environment=environment)
        assert (done.returncode, done.stderr) == (0, ""), command


def test_kernels_are_compiled_without_a_cache():
    arguments = ["generate", "builtin", "play some jazz", "--temperature", "0.5", "--seed", "1"]
    done = run_edgelm(*arguments, environment={"EDGELM_CACHE_DIR": "/dev/null/cache"})
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) <= 1, done.stderr


def test_a_letter_that_the_terminal_cannot_encode_is_escaped():
    environment = {"PYTHONIOENCODING": "ascii", "HOME": "/"}
    done = run_edgelm("generate", "builtin", "play Beyonc\u00e9", environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Beyonc\\xe9" in done.stdout


def test_a_chat_without_a_home_ends_normally():
    done = run_edgelm("chat", "builtin", environment={}, text="play some jazz\n/save ~/x\n/bye\n")
    assert done.returncode == 0, done.stderr
    assert "PlayMusic" in done.stdout
    assert "home" in done.stderr
    assert "internal error" not in done.stderr


@given(st.sampled_from(["cache", "data", "state"]), st.sampled_from(["", "relative/x", "/absolute", "/a b"]))
def test_only_an_absolute_path_is_used(kind, named):
    variable = f"XDG_{kind.upper()}_HOME"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable, named)
        patch.setenv("HOME", "/home/anna")
        found = user_folders.user_folder(kind)
        assert found.is_absolute()
        assert (found == Path(named) / "edgelm") == named.startswith("/")
        patch.setenv("HOME", "relative")
        assert user_folders.user_folder(kind).is_absolute()


def test_the_folders_of_a_user(monkeypatch):
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "EDGELM_CACHE_DIR", "EDGELM_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/anna")
    assert BoardCache.default().folder == Path("/home/anna/.cache/edgelm")
    assert BundleStore.default().folder == Path("/home/anna/.local/share/edgelm")
