"""Detects how edgelm was installed (uv, pipx or pip; clone, wheel or index) to print the command for an extra."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from edgelm.errors import MissingExtraError


def install_command(extra: str) -> str:
    """Return the command that adds an extra to this installation."""
    what, is_editable = _source(extra)
    prefix = Path(sys.prefix)
    if (prefix / "uv-receipt.toml").is_file():
        return f"uv tool install --force {what}"
    if (prefix / "pipx_metadata.json").is_file():
        return f"pipx install --force {what}"
    return f"{_installer(prefix)} install {'-e ' if is_editable else ''}{what}"


def missing_extra(feature: str, extra: str, module: str) -> MissingExtraError:
    """Return the error for a missing module, with the command that installs its extra."""
    return MissingExtraError(feature, extra, module, install_command(extra))


def _installer(prefix: Path) -> str:
    """Return the installer command for this interpreter's packages."""
    if importlib.util.find_spec("pip") is None:
        return f"uv pip --python {sys.executable}"
    found = shutil.which("pip")
    if found is not None and Path(found).parent == prefix / "bin":
        return "pip"
    return f"{sys.executable} -m pip"


def _source(extra: str) -> tuple[str, bool]:
    """Return what to install, quoted for a shell, and whether it is an editable clone."""
    record = _direct_url()
    url = urlsplit(str(record.get("url", "")))
    path = Path(unquote(url.path))
    if url.scheme != "file" or not path.exists():
        return f"'edgelm[{extra}]'", False
    directory = record.get("dir_info")
    return f"'{path}[{extra}]'", isinstance(directory, dict) and bool(directory.get("editable"))


def _direct_url() -> dict[str, Any]:
    """Return the installer's record of the package's source (PEP 610); empty for an index."""
    try:
        record = json.loads(distribution("edgelm").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
