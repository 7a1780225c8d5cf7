"""`edgelm cache`: show or clear the board cache."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from edgelm.system.board_cache import LIMIT_MB, BoardCache, CacheEntry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = (
        "The folder is EDGELM_CACHE_DIR, else ~/.cache/edgelm. Its files are made again when they are needed."
        f" EDGELM_CACHE_MB limits its size (default: {LIMIT_MB} MB): the least recently used files are removed first."
        " A folder that other users can write to is not used."
    )
    parser.add_argument("--clear", action="store_true", help="remove all files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """List the entries, or remove them."""
    cache = BoardCache.default()
    if args.clear:
        freed = cache.clear()
        print(json.dumps({"freed_bytes": freed}) if args.json else f"freed {freed / 1e6:.1f} MB in {cache.folder}")
        return 0
    entries = [_row(entry) for entry in cache.entries()]
    if args.json:
        print(json.dumps({"folder": str(cache.folder), "kernels_bytes": cache.numba_bytes(), "entries": entries}))
        return 0
    print(f"{cache.folder}: {len(entries)} entries, and compiled kernels of {cache.numba_bytes() / 1e6:.1f} MB")
    for entry in entries:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["made"]))
        print(f"{entry['bytes'] / 1e6:>9.1f} MB  {made}  {entry['kind']:<8} {entry['of']}")
    return 0


def _row(entry: CacheEntry) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "of": str(entry.metadata.get("bundle", "")),
        "bytes": entry.bytes,
        "made": entry.created_s,
    }
