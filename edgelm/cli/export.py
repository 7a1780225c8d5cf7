"""`edgelm export`: a Hugging Face checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from types import FrameType

from edgelm.cli.extras import reach
from edgelm.cli.progress import Progress

EXAMPLES = """\
examples:
  edgelm export HuggingFaceTB/SmolLM2-135M-Instruct smollm2/
  edgelm export my-checkpoint/ bundle/ --quant int8 --context 2048
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="Hugging Face directory or hub id (owner/name)")
    parser.add_argument("out", metavar="OUT", help="directory of the bundle to write")
    parser.add_argument("--quant", choices=["int4", "int8", "fp32"], default="int4", help="precision (default int4)")
    parser.add_argument(
        "--block-size",
        type=int,
        choices=[32, 64, 128],
        metavar="N",
        help="weights a scale: 32, 64, 128 (64 from a width of 512 on, else 32)",
    )
    parser.add_argument(
        "--method",
        choices=["auto", "rtn", "clip"],
        default="auto",
        help="how scales are chosen: rtn rounds to nearest, clip searches the least squared error (auto)",
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="longest conversation in tokens (the checkpoint's, at most 4096)"
    )
    parser.add_argument(
        "--via",
        choices=["native", "optimum"],
        default="native",
        help="optimum: convert optimum's export, for architectures without a builder here",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Export and say what came of it."""
    package = reach("edgelm_export", "edgelm export")
    signal.signal(signal.SIGTERM, _interrupt)
    start = time.monotonic()
    with Progress() as progress:
        bundle = package.export(
            args.checkpoint,
            args.out,
            quant=args.quant,
            block_size=args.block_size,
            method=args.method,
            context=args.context,
            via=args.via,
            force=args.force,
            progress=progress,
        )
    seconds = time.monotonic() - start
    manifest = bundle.manifest
    if args.json:
        facts = {
            "bundle": str(bundle.path),
            "bytes": bundle.bytes,
            "quant": manifest.quant,
            "bits_per_weight": round(manifest.bits_per_weight, 3),
            "context": manifest.context,
            "digest": manifest.digest,
            "seconds": round(seconds, 2),
        }
        print(json.dumps(facts))
        return 0
    print(
        f"{bundle.path}: {manifest.architecture}, {manifest.parameters / 1e6:.1f} M parameters, {manifest.quant}"
        f" ({manifest.bits_per_weight:.2f} bits a weight), {bundle.bytes / 1e6:.1f} MB, {seconds:.1f} s"
    )
    print(f'next: edgelm generate {bundle.path} "..."', file=sys.stderr)
    return 0


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """End like Ctrl-C, so that a half-written bundle is removed."""
    raise KeyboardInterrupt
