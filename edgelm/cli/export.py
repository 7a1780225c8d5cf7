"""`edgelm export`: convert a checkpoint (Hugging Face, GGUF, Ollama) to a quantized ONNX bundle."""

from __future__ import annotations

import argparse
import ast
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from edgelm.bundle.bundle_folder import Bundle
from edgelm.bundle.manifest import Matrix
from edgelm.cli.extras import import_extra
from edgelm.cli.tables import outline_table, prefix_text, quality_table, self_check_text
from edgelm.errors import UsageError
from edgelm.system.progress_bar import ProgressBar

EXAMPLES = """\
examples:
  edgelm export HuggingFaceTB/SmolLM2-135M-Instruct smollm2/
      int4, calibrated on self-generated text: minutes, 4.7 bits per weight; --fast takes seconds
  edgelm export my-checkpoint/ bundle/ --calibrate corpus.txt --verify held-out.txt
      int4 calibrated on your own text: less loss, measured on --verify
  edgelm export my-checkpoint/ bundle/ --quant mixed --calibrate self
      more bits for the most sensitive matrices: 5.5 bits per weight
  edgelm export my-checkpoint/ bundle/ --vocab commands.txt --vocab-size 16000 --max-bytes 150M --calibrate corpus.txt
      a model for one domain, at most 150 MB
  edgelm export model-Q4_0.gguf bundle/ --quant keep
      the quantized blocks of a GGUF file, unchanged; other precisions work for GGUF too
  edgelm export ollama:qwen2.5:0.5b bundle/
      a model of the Ollama installation on this machine
  edgelm export my-checkpoint/ --dry-run
      only print the plan

Documents in text files are separated by lines <|endoftext|>. Methods and their costs: export/README.md
"""

OPTIONS = (
    "quant",
    "block_size",
    "method",
    "calibrate",
    "fast",
    "embedding_bits",
    "context",
    "adapter",
    "vocab",
    "vocab_size",
    "verify",
    "max_kl",
    "min_agreement",
    "max_bytes",
    "report",
    "prefix",
    "kv",
    "via",
)
"""Arguments that `edgelm_export.export` takes by the same name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="Hugging Face directory, GGUF file, ollama:NAME[:TAG] or hub id"
    )
    parser.add_argument("out", metavar="OUT", nargs="?", help="directory of the bundle to write")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument("--dry-run", action="store_true", help="print the plan of each matrix, write nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")

    size = parser.add_argument_group("precision")
    size.add_argument(
        "--quant",
        choices=["int4", "int5", "int6", "int8", "mixed", "fp32", "keep"],
        help="default: int4 (int5 with --fast); mixed: 4 to 8 bits by each matrix's sensitivity, 5.5 bits per weight;"
        " keep: the Q4_0 and Q8_0 blocks of a GGUF file, unchanged",
    )
    size.add_argument(
        "--block-size",
        type=int,
        choices=[16, 32, 64, 128],
        metavar="N",
        help="weights per scale: 16, 32, 64, 128 (default: 32); larger blocks are smaller, faster and less exact",
    )
    size.add_argument("--asymmetric", action="store_true", help="add a zero point to each block")
    methods = find_methods()
    size.add_argument(
        "--method",
        choices=["auto", *methods] if methods else None,
        default="auto",
        help="quantizer (default: auto, which is gptq; clip with --fast; rtn for int8). "
        + " ".join(f"{name}: {summary}" for name, summary in methods.items()),
    )
    calibration = size.add_mutually_exclusive_group()
    calibration.add_argument(
        "--calibrate",
        metavar="FILE",
        help="calibration text of the model's domain, or `self` for self-generated text (default, except for int8)",
    )
    calibration.add_argument(
        "--fast", action="store_true", help="quantize without calibration: seconds instead of minutes, less exact"
    )
    size.add_argument(
        "--embedding-bits",
        type=int,
        choices=[4, 5, 6, 8],
        metavar="N",
        help="bits of embedding and head: 4, 5, 6 or 8 (default: 5; 6 with int6)",
    )
    size.add_argument(
        "--kv",
        choices=["fp32", "int8"],
        default="fp32",
        help="numbers in the KV cache (default: fp32); int8 takes a quarter of the memory and needs onnxruntime 1.28",
    )
    size.add_argument(
        "--max-bytes", type=parse_byte_count, metavar="N", help="largest size of the bundle, such as 150M"
    )

    gate = parser.add_argument_group("quality, compared with the unquantized checkpoint")
    gate.add_argument("--verify", metavar="FILE", help="text to measure on; it must differ from the calibration text")
    gate.add_argument("--max-kl", type=float, metavar="X", help="largest mean KL divergence in nats, else fail")
    gate.add_argument(
        "--min-agreement",
        type=float,
        metavar="X",
        help="smallest share of positions with the same most likely token, 0 to 1, else fail",
    )
    gate.add_argument("--report", action="store_true", help="plot the error and size of each matrix to report.svg")

    model = parser.add_argument_group("the model")
    model.add_argument(
        "--context", type=int, metavar="N", help="context in tokens (default: the checkpoint's, at most 4096)"
    )
    model.add_argument("--adapter", metavar="DIR", help="LoRA adapter of PEFT's format to merge, directory or hub id")
    model.add_argument("--vocab", metavar="FILE", help="text of the domain: keep only the tokens that it needs most")
    model.add_argument("--vocab-size", type=int, metavar="N", help="number of tokens that --vocab keeps")
    model.add_argument(
        "--prefix",
        metavar="FILE",
        help="static prefix of prompts, a text or a JSON list of messages: computed once, stored in the bundle",
    )
    model.add_argument(
        "--via",
        choices=["native", "optimum"],
        default="native",
        help="optimum: export with optimum-onnx, for architectures without a builder in edgelm",
    )


def find_methods() -> dict[str, str]:
    """Return the name of each quantization method and the first line of its module's docstring.

    Reads the files of edgelm_export.quantize.methods without importing them, which would load numba and onnx. Empty if
    edgelm_export is not installed.
    """
    package = find_spec("edgelm_export")
    found: dict[str, str] = {}
    for folder in (package and package.submodule_search_locations) or ():
        for file in sorted(Path(folder, "quantize", "methods").glob("[!_]*.py")):
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            found[file.stem] = docstring.partition("\n")[0].replace("%", "%%")
    return found


def parse_byte_count(text: str) -> int:
    """Parse a number of bytes; the suffixes K, M and G stand for 10^3, 10^6 and 10^9."""
    units = {"K": 10**3, "M": 10**6, "G": 10**9}
    digits, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        value = float(digits) * unit
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, such as 150M")
    return int(value)


def run(args: argparse.Namespace) -> int:
    """Export and print a summary."""
    package = import_extra("edgelm_export", "edgelm export")
    options = {name: getattr(args, name) for name in OPTIONS}
    options["symmetric"] = not args.asymmetric
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, raise_interrupt)
    if args.dry_run:
        with ProgressBar() as progress:
            outline = package.outline(args.checkpoint, progress=progress, **options)
        print(json.dumps(_outline_facts(outline)) if args.json else outline_table(outline))
        return 0
    if args.out is None:
        raise UsageError("OUT is required: the directory of the bundle to write (or --dry-run)")
    start = time.monotonic()
    with ProgressBar() as progress:
        bundle = package.export(args.checkpoint, args.out, force=args.force, progress=progress, **options)
    seconds = time.monotonic() - start
    print(json.dumps(_facts(bundle, seconds)) if args.json else _summary(bundle, seconds))
    for note in bundle.manifest.notes:
        print(f"edgelm export: note: {note}", file=sys.stderr)
    if not args.json:
        print(f'next: edgelm generate {bundle.path} "..."', file=sys.stderr)
    return 0


def _facts(bundle: Bundle, seconds: float) -> Mapping[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "bytes": bundle.bytes,
        "quant": manifest.quant,
        "bits_per_weight": round(manifest.bits_per_weight, 3),
        "context": manifest.context,
        "vocabulary": manifest.vocabulary,
        "quality": manifest.quality,
        "self_check": manifest.self_check,
        "notes": list(manifest.notes),
        "prefix_tokens": 0 if manifest.prefix is None else len(manifest.prefix.tokens),
        "digest": manifest.digest,
        "seconds": round(seconds, 2),
    }


def _summary(bundle: Bundle, seconds: float) -> str:
    m = bundle.manifest
    lines = [
        f"{bundle.path}: {m.architecture}, {m.parameters / 1e6:.1f} M parameters, {m.quant}"
        f" ({m.bits_per_weight:.2f} bits per weight), {bundle.bytes / 1e6:.1f} MB, {seconds:.1f} s"
    ]
    lines += _kept(m.matrices)
    if m.vocabulary is not None:
        v = m.vocabulary
        lines.append(
            f"vocabulary: {v['tokens']} of {v['tokens_before']} tokens, {v['saved_bytes'] / 1e6:.1f} MB saved; the"
            f" domain's text has {v['text_tokens'] / v['text_tokens_before']:.2f} times as many tokens as before"
        )
        if v["text_tokens_lost"]:
            lines.append(
                f"warning: {v['text_tokens_lost']} of the text's {v['text_tokens_before']} tokens were removed and now"
                f" consist of other tokens, at a loss of quality; --vocab-size {v['sufficient_size']} keeps them all"
            )
    if m.prefix is not None:
        lines.append(f"static prefix: {prefix_text(bundle)}")
    if m.self_check is not None:
        lines.append(self_check_text(m.self_check))
    methods = import_extra("edgelm_export.quantize.methods", "edgelm export")
    used = {matrix.method for matrix in m.matrices} & set(methods.method_names())
    fallbacks = {methods.load_method(name).fallback for name in used}
    uncalibrated = sum(matrix.method is not None and matrix.method in fallbacks for matrix in m.matrices)
    if uncalibrated:
        lines.append(
            f"calibration: {uncalibrated} of {len(m.matrices)} matrices are stored without it, because their error on"
            " the validation positions was smaller that way"
        )
    if m.quality is not None:
        lines.append(quality_table(m.quality))
    return "\n".join(lines)


def _kept(matrices: Sequence[Matrix]) -> list[str]:
    """Describe the matrices that were copied from the GGUF file, if any."""
    kept = [matrix for matrix in matrices if matrix.method == "keep"]
    if not kept:
        return []
    others = [matrix.name for matrix in matrices if matrix.method != "keep"]
    line = f"copied unchanged: {len(kept)} of {len(matrices)} matrices"
    if others:
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        line += f"; neither Q4_0 nor Q8_0, so rounded to int8: {shown}"
    return [line]


def _outline_facts(outline: Any) -> Mapping[str, Any]:
    return {
        "bytes": outline.bytes,
        "bits_per_weight": round(outline.bits_per_weight, 3),
        "kl": outline.kl,
        "matrices": [
            {
                "name": matrix.name,
                "rows": matrix.rows,
                "columns": matrix.columns,
                "bits": matrix.bits,
                "block_size": matrix.block_size,
                "symmetric": matrix.symmetric,
                "method": matrix.method,
                "bytes": matrix.bytes(),
            }
            for matrix in outline.matrices
        ],
    }


def raise_interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Handle a signal like Ctrl-C, so that an incomplete bundle is removed."""
    raise KeyboardInterrupt
