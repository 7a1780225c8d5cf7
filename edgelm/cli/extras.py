"""Import edgelm_export and edgelm_devices; name the extra to install if a library is missing."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires
from types import ModuleType

from edgelm.system.installation import missing_extra


def import_extra(module: str, feature: str) -> ModuleType:
    """Import a module of edgelm_export or edgelm_devices.

    Raises `MissingExtraError` with the extra that installs the missing library, read from the package's metadata.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise missing_extra_error(error, feature) from error


def missing_extra_error(error: ModuleNotFoundError, feature: str) -> Exception:
    """Return an error that names the extra to install, or the given error if no extra installs the module."""
    missing = (error.name or "").partition(".")[0]
    extra = find_extra(missing)
    return error if extra is None else missing_extra(feature, extra, missing)


def find_extra(module: str) -> str | None:
    """Return the first extra that installs a module of that name, or None."""
    try:
        lines = requires("edgelm") or []
    except PackageNotFoundError:
        return None
    for line in lines:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0].replace("-", "_").lower()
        found = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if found and name != "edgelm" and name in (module.lower(), f"{module.lower()}_onnx"):
            return found.group(1)
    return None
