"""`edgelm show`: show the details of a model, from the catalogue and from its bundle."""

from __future__ import annotations

import argparse
import dataclasses
import json

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.bundle.catalogue import CatalogueModel, load_catalogue
from edgelm.bundle.store import BUILTIN, BundleStore, missing_bundle_error, resolve_bundle_path
from edgelm.cli.info import derived_facts, info_rows
from edgelm.cli.models import format_parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("name", metavar="NAME", help="a name shown by `edgelm models` or `edgelm list`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the catalogue's entry and the stored bundle, if they exist."""
    known = load_catalogue().get(args.name)
    is_here = resolve_bundle_path(args.name).is_dir()
    if known is None and not is_here:
        raise missing_bundle_error(args.name)
    bundle = open_bundle(args.name) if is_here else None
    origin = BundleStore.default().origin(args.name) if is_here and args.name != BUILTIN else None
    if args.json:
        print(
            json.dumps(
                {
                    "name": args.name,
                    "catalogue": known and dataclasses.asdict(known),
                    "origin": origin and dataclasses.asdict(origin),
                    "bundle": bundle and {**dataclasses.asdict(bundle.manifest), **derived_facts(bundle)},
                }
            )
        )
        return 0
    lines = [("model", args.name), *(_entry(known) if known is not None else [])]
    if origin is not None:
        lines.append(("from", origin.source + (f" at {origin.revision}" if origin.revision else "")))
    if bundle is None:
        lines.append(("here", f"no: edgelm pull {args.name}"))
    else:
        lines += info_rows(bundle)
    for label, value in lines:
        print(f"{label:<13} {value}")
    return 0


def _entry(model: CatalogueModel) -> list[tuple[str, str]]:
    """Return labels and values of the catalogue's entry."""
    account = " (needs an account that has accepted it)" if model.gated else ""
    variants = [
        f"{variant.quant}{', no calibration' * variant.fast}: {variant.mb} MB,"
        f" {variant.memory_mb} MB of memory with 2,048 tokens"
        for variant in model.variants
    ]
    return [
        ("hub", f"{model.hub}{f' at {model.revision}' if model.revision else ''}"),
        ("licence", model.licence + account),
        ("parameters", format_parameters(model)),
        ("good at", model.good_at),
        ("boards", f"at least {model.smallest_board_gb} GB of memory"),
        *(("variants" if i == 0 else "", text) for i, text in enumerate(variants)),
    ]
