"""Importing Numba without the settings of the current folder.

Numba reads `.numba_config.yaml` there, when it is imported and whenever it compiles: a stranger's file could name a
module to import (cache_locator_classes), or end the program by not being YAML. Variables NUMBA_* count as ever.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Final

NUMBA_CONFIG_FILE: Final = ".numba_config.yaml"


def import_numba() -> Any:
    """Return the module, which from now on reads no settings from a file."""
    if "numba" in sys.modules or not Path(NUMBA_CONFIG_FILE).exists():
        numba = importlib.import_module("numba")
    else:
        numba = _without_yaml()
    config = numba.core.config
    if getattr(config, "_config_fname", None) == NUMBA_CONFIG_FILE:
        config._config_fname = os.devnull  # noqa: SLF001  there is no public way
        config.reload_config()
    return numba


def _without_yaml() -> Any:
    """Import Numba where it finds no YAML reader: then it warns of the file and leaves it alone."""
    missing = object()
    before: Any = sys.modules.get("yaml", missing)
    sys.modules["yaml"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A Numba config file is found")
            return importlib.import_module("numba")
    finally:
        if before is missing:
            del sys.modules["yaml"]
        else:
            sys.modules["yaml"] = before
