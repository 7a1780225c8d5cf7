"""How edgelm was installed here, and so how it gets an extra: by uv, pipx or pip, from a clone, a wheel or an index."""

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
    """Return the error that says which command adds the extra that brings a module."""
    return MissingExtraError(feature, extra, module, install_command(extra))


def _installer(prefix: Path) -> str:
    """Return what installs into this interpreter's packages."""
    if importlib.util.find_spec("pip") is None:
        return f"uv pip --python {sys.executable}"
    found = shutil.which("pip")
    if found is not None and Path(found).parent == prefix / "bin":
        return "pip"
    return f"{sys.executable} -m pip"


def _source(extra: str) -> tuple[str, bool]:
    """Return what to install, quoted for a shell, and whether it is a clone that is used where it lies."""
    record = _direct_url()
    url = urlsplit(str(record.get("url", "")))
    path = Path(unquote(url.path))
    if url.scheme != "file" or not path.exists():
        return f"'edgelm[{extra}]'", False
    directory = record.get("dir_info")
    return f"'{path}[{extra}]'", isinstance(directory, dict) and bool(directory.get("editable"))


def _direct_url() -> dict[str, Any]:
    """Return what the installer wrote down of where the package came from (PEP 610); empty from an index."""
    try:
        record = json.loads(distribution("edgelm").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
