"""`edgelm list`: list the models on this machine."""

from __future__ import annotations

import argparse
import json
from typing import Any

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.bundle.store import BUILTIN, BundleStore
from edgelm.errors import BundleError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = "Models are stored in EDGELM_DATA_DIR, else ~/.local/share/edgelm. `edgelm pull NAME` adds one."
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(args: argparse.Namespace) -> int:
    """Print the stored bundles and the built-in one."""
    store = BundleStore.default()
    rows = [_row(store, name) for name in [BUILTIN, *store.names()]]
    if args.json:
        print(json.dumps(rows))
        return 0
    print(f"{'name':<24} {'parameters':>10} {'precision':>9} {'MB':>8}  from")
    for row in rows:
        if "error" in row:
            print(f"{row['name']:<24} cannot be opened: {row['error']}")
            continue
        revision = f" at {row['revision'][:12]}" if row["revision"] else ""
        print(
            f"{row['name']:<24} {row['parameters'] / 1e6:>8.1f} M {row['quant']:>9} {row['bytes'] / 1e6:>8.1f}"
            f"  {row['source'] or ''}{revision}".rstrip()
        )
    return 0


def _row(store: BundleStore, name: str) -> dict[str, Any]:
    try:
        bundle = open_bundle(name, verify=False)
    except BundleError as error:
        return {"name": name, "error": str(error)}
    origin = store.origin(name) if name != BUILTIN else None
    return {
        "name": name,
        "bundle": str(bundle.path),
        "parameters": bundle.manifest.parameters,
        "quant": bundle.manifest.quant,
        "bytes": bundle.bytes,
        "digest": bundle.manifest.digest,
        "source": "comes with edgelm" if name == BUILTIN else origin and origin.source,
        "revision": origin and origin.revision,
    }
