"""Running a model opens no network connection and writes nothing to the home folder."""

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
time.sleep(4)  # onnxruntime's telemetry resolves a host name within two seconds
"""


def traced(folder, first="", **environment):
    """Run a program; return its output, the trace of its network calls, and the files it wrote to the home folder."""
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
    """Return whether strace is installed and allowed to trace; some containers forbid it."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_trace(), reason="needs strace (apt-get install strace) and permission to trace")
@pytest.mark.parametrize("first", ["", "import edgelm_export", "import edgelm_devices.smoke"])
def test_a_model_opens_no_connection_and_writes_no_file_in_the_home_folder(tmp_path, first):
    printed, calls, files = traced(tmp_path, first)
    assert printed.strip()
    assert calls == []
    assert files == []


def test_telemetry_variables_of_the_user_are_kept():
    code = "import os, edgelm; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    kept = {name: value for name, value in os.environ.items() if not name.endswith("DISABLE_TELEMETRY")}
    for given, printed in (({}, "1 1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0 1")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == printed
