"""What goes over the network and into the home folder: nothing that nobody asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

PROGRAM = """
import sys, time
{first}
import edgelm
with edgelm.load("builtin") as lm:
    print(lm.generate("play jazz", max_tokens=3).text)
time.sleep(4)  # onnxruntime's client looks its maker's name up within a second or two
"""


def traced(folder, first="", **environment):
    """Run a program; return what it printed, the lines of its network calls and the files that it left at home."""
    home, trace = folder / "home", folder / "trace.txt"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.endswith("DISABLE_TELEMETRY")}
    kept |= {"HOME": str(home), "EDGELM_CACHE_DIR": str(folder / "cache"), **environment}
    kept.pop("XDG_CACHE_HOME", None)
    command = ["strace", "-f", "-qq", "-o", str(trace), "-e", "trace=%network", sys.executable, "-c"]
    done = subprocess.run(
        [*command, PROGRAM.format(first=first)], env=kept, capture_output=True, text=True, timeout=120, check=True
    )
    calls = [line for line in trace.read_text().splitlines() if "connect(" in line or "sendto(" in line]
    files = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    return done.stdout, calls, files


def can_trace():
    """Whether strace is here and may look at processes: not every container lets it."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_trace(), reason="needs strace, which apt-get install strace brings, and leave to use it")
@pytest.mark.parametrize("first", ["", "import edgelm_export", "import edgelm_devices.smoke"])
def test_a_model_runs_without_a_socket_and_leaves_nothing_at_home(tmp_path, first):
    printed, calls, files = traced(tmp_path, first)
    assert printed.strip()
    assert calls == []
    assert files == []


def test_who_sets_the_variables_is_obeyed():
    code = "import os, edgelm; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    kept = {name: value for name, value in os.environ.items() if not name.endswith("DISABLE_TELEMETRY")}
    for given, printed in (({}, "1 1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0 1")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == printed
