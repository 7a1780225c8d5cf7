"""`edgelm rm`: remove models by name."""

from __future__ import annotations

import argparse

from edgelm.bundle.store import BUILTIN, BundleStore
from edgelm.errors import EdgelmError
from edgelm.system.board_cache import BoardCache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("names", metavar="NAME", nargs="+", help="a model of `edgelm list`")


def run(args: argparse.Namespace) -> int:
    """Remove bundles, and what was made of them for this board; of several names all must be here."""
    store, cache = BundleStore.default(), BoardCache.default()
    for name in args.names:
        if name == BUILTIN:
            raise EdgelmError("the built-in model is part of the package; nothing was removed")
        if not store.bundle_path(name).is_dir():
            here = ", ".join(store.names()) or "none"
            raise EdgelmError(f"there is no model {name!r:.80} here (there: {here}); nothing was removed")
    for name in dict.fromkeys(args.names):
        freed = store.remove(name) + cache.remove_bundle(store.bundle_path(name))
        print(f"removed {name}: {freed / 1e6:.1f} MB")
    return 0
