"""`edgelm pull`: download a model by name and convert it for this board."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

from edgelm.bundle.bundle_folder import Bundle, open_bundle
from edgelm.bundle.catalogue import CatalogueModel, ModelVariant, load_catalogue
from edgelm.bundle.catalogue import check_name as check_model_name
from edgelm.bundle.manifest import MANIFEST
from edgelm.bundle.store import BUILTIN, BundleStore, Origin
from edgelm.cli.export import raise_interrupt
from edgelm.cli.extras import import_extra
from edgelm.cli.tables import self_check_text
from edgelm.errors import BundleError, EdgelmError, UsageError
from edgelm.system.memory import read_memory_mb
from edgelm.system.progress_bar import ProgressBar
from edgelm.validation import suggest_match

EPILOG: Final = """\
examples:
  edgelm pull smollm2-135m
      downloaded from the hub, converted with the catalogue's settings for this board
  edgelm pull smollm2-135m --from model/
      the same from a checkpoint on this machine: a directory, a GGUF file or ollama:NAME
  edgelm pull HuggingFaceTB/SmolLM2-135M-Instruct
      any other model of the hub, by its id; its name becomes the last part of the id
  edgelm pull my-model --from my-checkpoint/ --quant int8
      your own checkpoint, under a name

A name can be used wherever a BUNDLE is expected. Bundles are stored in EDGELM_DATA_DIR, else ~/.local/share/edgelm.
edgelm export has more options.
"""

HUB_ID: Final = r"[\w-][\w.-]*/[\w-][\w.-]*"
"""owner/name, for re.fullmatch."""

BYTES_PER_PARAMETER: Final = 2
"""Of a checkpoint on the hub, mostly bfloat16: an estimate of the download."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", metavar="NAME", help="a model of `edgelm models`, or a hub id (owner/name)")
    parser.add_argument(
        "--from", dest="source", metavar="CHECKPOINT", help="convert this checkpoint instead of a download"
    )
    parser.add_argument(
        "--quant",
        choices=["int4", "int5", "int6", "int8", "mixed", "fp32"],
        help="precision (default: the best one for this board)",
    )
    parser.add_argument("--fast", action="store_true", help="convert without calibration: faster, less exact")
    parser.add_argument("--context", type=int, metavar="N", help="context in tokens")
    parser.add_argument("--force", action="store_true", help="download and convert again")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Download, convert and store the model."""
    store, known = BundleStore.default(), load_catalogue()
    model = known.get(args.name)
    name = args.name.rpartition("/")[2].lower() if model is None else model.name
    _check(args, name, model)
    place = store.bundle_path(name)
    bundle = _open_intact(place)
    if place.is_dir() and bundle is None:
        print(f"{name} is damaged: converting it again", file=sys.stderr)
        args.force = True
        if not (place / MANIFEST).is_file():
            store.remove(name)
    if bundle is not None and not args.force:
        _print_result(
            args,
            name,
            bundle,
            None,
            f"{name} exists already ({_size(bundle)}); --force downloads and converts it again",
        )
        return 0
    package = import_extra("edgelm_export", "edgelm pull")
    options = _options(args, model)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, raise_interrupt)
    start = time.monotonic()
    source, revision = args.source, None
    downloads = store.folder / "downloads" / name
    if source is None:
        source = model.hub if model is not None else args.name
        revision = _fetch(source, model, downloads)
    with ProgressBar() as progress:
        bundle = package.export(
            downloads if args.source is None else source, place, force=args.force, progress=progress, **options
        )
    origin = Origin(source if args.source is None or ":" in source else str(Path(source).absolute()), revision)
    store.write_origin(name, origin)
    shutil.rmtree(downloads, ignore_errors=True)
    check = bundle.manifest.self_check
    lines = [f"{name}: {_size(bundle)}, {time.monotonic() - start:.0f} s"]
    lines += [self_check_text(check)] if check is not None else []
    _print_result(args, name, bundle, origin, "\n".join(lines))
    return 0


def _open_intact(place: Path) -> Bundle | None:
    """Return the stored bundle if its files match its manifest, else None."""
    try:
        return open_bundle(place)
    except BundleError:
        return None


def _check(args: argparse.Namespace, name: str, model: CatalogueModel | None) -> None:
    """Raise `EdgelmError` if the name is not valid or not known."""
    if name == BUILTIN:
        raise EdgelmError("the built-in model is part of the package and needs no download: `edgelm generate builtin`")
    if "/" in args.name and Path(args.name).exists():
        raise UsageError(f"{args.name} is a local path: edgelm pull NAME --from {args.name}")
    if args.source is not None and "/" in args.name:
        raise UsageError("with --from, NAME is the new name of the model and must not contain /")
    if "/" in args.name and not re.fullmatch(HUB_ID, args.name):
        raise UsageError(f"{args.name!r:.80} is not a hub id, such as HuggingFaceTB/SmolLM2-135M-Instruct")
    if model is None and args.source is None and "/" not in args.name:
        raise EdgelmError(
            f"{args.name!r:.80} is not in the catalogue (`edgelm models`); for other models give a hub id or --from"
            + suggest_match(args.name, load_catalogue(), 0.5)
        )
    check_model_name(name if args.source is None else args.name)


def _options(args: argparse.Namespace, model: CatalogueModel | None) -> dict[str, Any]:
    """Return the export options: the flags, else the catalogue's variant that fits this board."""
    options = {"quant": args.quant, "fast": args.fast, "context": args.context}
    if model is None:
        return options
    memory = read_memory_mb()
    variant = model.choose_variant(memory)
    if variant is None and not args.quant:
        smallest = min(model.variants, key=lambda variant: variant.memory_mb)
        raise EdgelmError(
            f"{model.name} needs about {smallest.memory_mb} MB of memory in {smallest.quant}, this board has"
            f" {memory:.0f} MB; `edgelm models` lists smaller models; --quant converts it anyway"
        )
    chosen = variant or ModelVariant(args.quant, 0, 0)
    options["quant"] = args.quant or chosen.quant
    options["fast"] = (args.fast or chosen.fast) and options["quant"] not in {"int8", "fp32"}
    return options


def _fetch(source: str, model: CatalogueModel | None, folder: Path) -> str:
    """Download a model of the hub; return its commit. Raises `EdgelmError` if the disk is too small."""
    hub = import_extra("edgelm_export.checkpoint.hub", "edgelm pull")
    offline_advice = f"use a local copy: edgelm pull {folder.name} --from model/"
    revision: str = hub.resolve_commit(source, None if model is None else model.revision, offline_advice=offline_advice)
    needs = (
        0 if model is None else BYTES_PER_PARAMETER * model.parameters + 1_000_000 * max(f.mb for f in model.variants)
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise EdgelmError(f"{folder} cannot be written: {error.strerror or error}") from error
    if free < needs:
        raise EdgelmError(f"{folder} has {free / 1e6:.0f} MB free, about {needs / 1e6:.0f} MB are needed")
    print(f"downloading {source} at {revision[:12]}", file=sys.stderr)
    hub.download(source, revision, folder, offline_advice=offline_advice)
    return revision


def _size(bundle: Bundle) -> str:
    manifest = bundle.manifest
    return f"{manifest.parameters / 1e6:.1f} M parameters, {manifest.quant}, {bundle.bytes / 1e6:.1f} MB"


def _print_result(args: argparse.Namespace, name: str, bundle: Bundle, origin: Origin | None, text: str) -> None:
    if args.json:
        facts = {
            "name": name,
            "bundle": str(bundle.path),
            "bytes": bundle.bytes,
            "quant": bundle.manifest.quant,
            "digest": bundle.manifest.digest,
            "source": None if origin is None else origin.source,
            "revision": None if origin is None else origin.revision,
            "self_check": bundle.manifest.self_check,
        }
        print(json.dumps(facts))
        return
    print(text)
    command = "chat" if bundle.manifest.prompts_are_messages else "generate"
    print(f"next: edgelm {command} {name}", file=sys.stderr)
