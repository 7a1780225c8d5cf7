"""Command lines for a second Python that runs nothing of the current folder.

`python -m` and `python -c` put the current folder first on sys.path: a file numpy.py that lies there is executed. With
-I nothing of that folder is imported, nor is what variables for Python name; the paths that the child needs are passed.
"""

from __future__ import annotations

import json
import os
import site
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

BOOTSTRAP_CODE: Final = (
    "import json, sys; paths, module, name = json.loads(sys.argv.pop(1)); sys.path[:0] = paths; "
    "import importlib; sys.exit(getattr(importlib.import_module(module), name)())"
)


def build_python_command(module: str, function: str, *arguments: str) -> list[str]:
    """Return the command that calls a function of a module without parameters in another process.

    `arguments` are its sys.argv[1:]; what it returns is the exit status, as for `sys.exit`.
    """
    return build_command([sys.executable], list_import_paths(), module, function, *arguments)


def build_command(
    python: Sequence[str], folders: Sequence[str], module: str, function: str, *arguments: str
) -> list[str]:
    """Return the same for the words that start another interpreter, and for folders that it looks into first."""
    return [*python, "-I", "-c", BOOTSTRAP_CODE, json.dumps([list(folders), module, function]), *arguments]


def list_import_paths() -> list[str]:
    """Return the folders that a child needs and -I leaves out: edgelm's own, PYTHONPATH's, the user's packages.

    PYTHONPATH counts as far as it names absolute paths: an empty or relative part of it is the current folder, or lies
    in it.
    """
    found = [str(Path(__file__).resolve().parents[2])]
    if not sys.flags.ignore_environment:
        found += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(path).is_absolute()]
    if site.ENABLE_USER_SITE:
        found.append(site.getusersitepackages())
    return list(dict.fromkeys(found))
