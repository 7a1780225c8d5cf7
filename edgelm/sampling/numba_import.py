"""Imports Numba without the settings of the current folder.

Numba reads `.numba_config.yaml` from there, at import and whenever it compiles. An untrusted file could name a module
to import (cache_locator_classes), or end the program by not being YAML. Environment variables NUMBA_* still apply.
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
    """Return the module `numba`, which reads no settings file from now on."""
    if "numba" in sys.modules or not Path(NUMBA_CONFIG_FILE).exists():
        numba = importlib.import_module("numba")
    else:
        numba = _import_without_yaml()
    config = numba.core.config
    if getattr(config, "_config_fname", None) == NUMBA_CONFIG_FILE:
        config._config_fname = os.devnull  # noqa: SLF001  there is no public way
        config.reload_config()
    return numba


def _import_without_yaml() -> Any:
    """Import Numba while PyYAML cannot be imported: it then warns about the settings file and ignores it."""
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
