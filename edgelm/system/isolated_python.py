"""Command lines for a child Python process that imports nothing from the current folder.

`python -m` and `python -c` put the current folder first on sys.path, so a file numpy.py there would be executed. With
-I Python ignores that folder and its environment variables; the paths that the child needs are passed as an argument.
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
    """Return the command that calls a function of a module, without parameters, in a child process.

    `arguments` become the child's sys.argv[1:]; the function's result is the exit status, as for `sys.exit`.
    """
    return build_command([sys.executable], list_import_paths(), module, function, *arguments)


def build_command(
    python: Sequence[str], folders: Sequence[str], module: str, function: str, *arguments: str
) -> list[str]:
    """Return the same for another interpreter: `python` starts it, `folders` come first on its sys.path."""
    return [*python, "-I", "-c", BOOTSTRAP_CODE, json.dumps([list(folders), module, function]), *arguments]


def list_import_paths() -> list[str]:
    """Return the folders that a child needs and -I omits: edgelm's own, PYTHONPATH's, the user's site-packages.

    Only absolute paths of PYTHONPATH are included: an empty or relative one depends on the current folder.
    """
    found = [str(Path(__file__).resolve().parents[2])]
    if not sys.flags.ignore_environment:
        found += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(path).is_absolute()]
    if site.ENABLE_USER_SITE:
        found.append(site.getusersitepackages())
    return list(dict.fromkeys(found))
