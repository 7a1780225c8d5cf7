"""`edgelm models`: which models `edgelm pull` knows."""

from __future__ import annotations

import argparse
import dataclasses
import json

from edgelm.bundle.catalogue import CatalogueModel, load_catalogue
from edgelm.bundle.store import BundleStore
from edgelm.system.sensors import read_memory_mb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = (
        "MB: disk space of the variant for this board; int5 variants are exported without calibration. Other models of"
        " the hub: edgelm pull owner/name. `edgelm show NAME` says more of one."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(args: argparse.Namespace) -> int:
    """List the catalogue."""
    memory, here = read_memory_mb(), set(BundleStore.default().names())
    models = load_catalogue().values()
    if args.json:
        print(json.dumps([{**dataclasses.asdict(m), "here": m.name in here} for m in models]))
        return 0
    print(f"{'name':<15} {'parameters':>10} {'here as':>8} {'MB':>6} {'board':>8}  licence, good at")
    for model in models:
        variant = model.choose_variant(memory)
        quant, size = ("too big", "") if variant is None else (variant.quant, str(variant.mb))
        print(
            f"{model.name:<15} {parameters(model):>10} {quant:>8} {size:>6} {f'{model.smallest_board_gb} GB':>8} "
            f" {model.licence}{', ask first' if model.gated else ''}: {model.good_at}{' (here)' * (model.name in here)}"
        )
    return 0


def parameters(model: CatalogueModel) -> str:
    """Return how many a model has, in millions or thousands of millions."""
    return f"{model.parameters / 1e6:.0f} M" if model.parameters < 1e9 else f"{model.parameters / 1e9:.1f} G"
