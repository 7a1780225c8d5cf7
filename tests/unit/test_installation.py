"""The command that installs an extra depends on how edgelm was installed."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.system import installation
from edgelm.system.installation import missing_extra

ROOT = Path(__file__).parents[2]


@pytest.fixture
def set_record(tmp_path, monkeypatch):
    """An environment with pip, and a wheel with a space in its path; call it to set the installer's record."""
    (tmp_path / "env" / "bin").mkdir(parents=True)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    monkeypatch.setattr(installation.shutil, "which", lambda _: str(tmp_path / "env" / "bin" / "pip"))
    wheel = tmp_path / "a wheel.whl"
    wheel.touch()

    def record(content):
        monkeypatch.setattr(installation, "_direct_url", lambda: content)
        return wheel

    record({})
    return record


def of(folder, name):
    (Path(sys.prefix) / name).touch()
    return folder


@pytest.mark.parametrize(
    ("file", "command"),
    [
        (None, "pip install"),
        ("uv-receipt.toml", "uv tool install --force"),
        ("pipx_metadata.json", "pipx install --force"),
    ],
)
def test_the_installer_decides(set_record, file, command):
    if file is not None:
        (Path(sys.prefix) / file).touch()
    assert installation.install_command("export") == f"{command} 'edgelm[export]'"
    set_record({"url": Path("/nowhere/x.whl").as_uri(), "archive_info": {}})
    assert installation.install_command("export") == f"{command} 'edgelm[export]'"  # the wheel does not exist
    wheel = set_record({"url": (Path(sys.prefix).parent / "a wheel.whl").as_uri(), "archive_info": {}})
    assert shlex.split(installation.install_command("export"))[-1] == f"{wheel}[export]"


def test_an_editable_clone_stays_editable(set_record):
    folder = Path(sys.prefix).parent
    set_record({"url": folder.as_uri(), "dir_info": {"editable": True}})
    assert installation.install_command("all") == f"pip install -e '{folder}[all]'"
    set_record({"url": folder.as_uri(), "dir_info": {}})
    assert installation.install_command("all") == f"pip install '{folder}[all]'"


def test_a_pip_of_another_environment_is_not_used(set_record, monkeypatch):
    monkeypatch.setattr(installation.shutil, "which", lambda _: "/usr/bin/pip")
    assert installation.install_command("all") == f"{sys.executable} -m pip install 'edgelm[all]'"
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda _: None)
    assert installation.install_command("all") == f"uv pip --python {sys.executable} install 'edgelm[all]'"


RECORDS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["url", "dir_info", "editable"]), inner),
    max_leaves=6,
)


@given(RECORDS)
def test_any_record_of_an_installer_gives_a_command(record):
    class Distribution:
        def read_text(self, _):
            return json.dumps(record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(installation, "distribution", lambda _: Distribution())
        assert "[export]" in installation.install_command("export")


def test_the_error_has_the_command():
    assert installation.install_command("export") in str(missing_extra("edgelm export", "export", "onnx"))


@pytest.mark.parametrize("version", [(3, 9), (2, 7)])
def test_make_names_a_python_that_is_too_old(tmp_path, version):
    """A fake interpreter reports an old version, and fails on any other command."""
    old = tmp_path / "old-python"
    old.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.version_info = type('V', (tuple,), {{}})({(*version, 0)})\n"
        "assert sys.argv[1] == '-c', 'nothing else is run'\n"
        "exec(sys.argv[2])\n"
    )
    old.chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt", "requirements.txt", "requirements-test.txt"):
        (tmp_path / name).touch()
    for target in ("demo", "test"):
        done = subprocess.run(
            ["make", "-f", ROOT / "Makefile", target, f"PYTHON={old}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert "3.10" in done.stderr
        assert len(done.stderr.splitlines()) <= 2  # make's own line is the second
