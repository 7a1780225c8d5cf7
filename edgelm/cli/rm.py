"""`edgelm rm`: remove models by name."""

from __future__ import annotations

import argparse

from edgelm.bundle.store import BUILTIN, BundleStore
from edgelm.errors import EdgelmError
from edgelm.system.board_cache import BoardCache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("names", metavar="NAME", nargs="+", help="a name shown by `edgelm list`")


def run(args: argparse.Namespace) -> int:
    """Remove bundles and their files in the board cache. If one of several names is unknown, none is removed."""
    store, cache = BundleStore.default(), BoardCache.default()
    for name in args.names:
        if name == BUILTIN:
            raise EdgelmError("the built-in model is part of the package; nothing was removed")
        if not store.bundle_path(name).is_dir():
            here = ", ".join(store.names()) or "none"
            raise EdgelmError(f"there is no model {name!r:.80} on this machine (models: {here}); nothing was removed")
    for name in dict.fromkeys(args.names):
        freed = store.remove(name) + cache.remove_bundle(store.bundle_path(name))
        print(f"removed {name}: {freed / 1e6:.1f} MB")
    return 0
