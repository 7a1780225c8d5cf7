"""`edgelm models`: list the models that can be pulled by name."""

from __future__ import annotations

import argparse
import dataclasses
import json

from edgelm.bundle.catalogue import CatalogueModel, load_catalogue
from edgelm.bundle.store import BundleStore
from edgelm.system.memory import read_memory_mb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = (
        "MB: size on disk of the variant for this board; int5 variants are made without calibration. Other models of"
        " the hub: edgelm pull owner/name. Details: edgelm show NAME."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(args: argparse.Namespace) -> int:
    """Print the catalogue."""
    memory, here = read_memory_mb(), set(BundleStore.default().names())
    models = load_catalogue().values()
    if args.json:
        print(json.dumps([{**dataclasses.asdict(m), "here": m.name in here} for m in models]))
        return 0
    print(f"{'name':<15} {'parameters':>10} {'here as':>8} {'MB':>6} {'board':>8}  licence, good at")
    for model in models:
        variant = model.choose_variant(memory)
        quant, size = ("too big", "") if variant is None else (variant.quant, str(variant.mb))
        account, is_here = ", needs an account" * model.gated, " (here)" * (model.name in here)
        print(
            f"{model.name:<15} {format_parameters(model):>10} {quant:>8} {size:>6}"
            f" {f'{model.smallest_board_gb} GB':>8}  {model.licence}{account}: {model.good_at}{is_here}"
        )
    return 0


def format_parameters(model: CatalogueModel) -> str:
    """Return the number of parameters, in millions (M) or 10^9 (G)."""
    return f"{model.parameters / 1e6:.0f} M" if model.parameters < 1e9 else f"{model.parameters / 1e9:.1f} G"
