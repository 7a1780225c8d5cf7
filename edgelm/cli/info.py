"""`edgelm info`: show the manifest, sizes, quality and memory of a bundle."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from edgelm.bundle.bundle_folder import Bundle, open_bundle
from edgelm.bundle.manifest import Manifest
from edgelm.cli.flags import BUNDLE_HELP
from edgelm.cli.tables import prefix_text, quality_table, self_check_text
from edgelm.runtime.memory_plan import PREFIX_CACHE_MB, MemoryPlan, plan_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("--json", action="store_true", help="print the manifest and the sizes as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Verify the bundle and print it."""
    bundle = open_bundle(args.bundle)
    if args.json:
        print(json.dumps({**dataclasses.asdict(bundle.manifest), **derived_facts(bundle)}))
        return 0
    for label, value in info_rows(bundle):
        print(f"{label:<13} {value}")
    return 0


def derived_facts(bundle: Bundle) -> dict[str, Any]:
    """Return sizes and memory, which are computed from the manifest."""
    manifest = bundle.manifest
    return {
        "digest": manifest.digest,
        "bytes": bundle.bytes,
        "bits_per_weight": round(manifest.bits_per_weight, 4),
        "kv_bytes_per_token": manifest.cache.bytes_per_token(),
        "memory_bytes": _plan(manifest).total,
    }


def _quality_rows(m: Manifest) -> list[tuple[str, str]]:
    lines = [] if m.quality is None else quality_table(m.quality).splitlines()
    if m.self_check is not None:
        lines.append(self_check_text(m.self_check))
    first, *others = lines or ["not measured at export"]
    return [("quality", first), *(("", line) for line in others)]


def _extras(m: Manifest) -> list[tuple[str, str]]:
    """Return rows about pruning, adapter, notes and the needed onnxruntime version."""
    found = []
    if m.vocabulary is not None:
        v = m.vocabulary
        found.append(("pruned", f"{v['tokens']} of {v['tokens_before']} tokens, {v['saved_bytes'] / 1e6:.2f} MB saved"))
    if m.adapter is not None:
        found.append(("adapter", m.adapter))
    found += [("note", note) for note in m.notes]
    if m.needs_onnxruntime is not None:
        found.append(("needs", f"onnxruntime {m.needs_onnxruntime} or newer"))
    return found


def _plan(m: Manifest) -> MemoryPlan:
    """Return the largest memory of `edgelm generate` with its defaults."""
    return plan_memory(m, rows=2, context=m.context, prefix_cache_bytes=PREFIX_CACHE_MB * 1_000_000)


def info_rows(bundle: Bundle) -> list[tuple[str, str]]:
    """Return labels and values to print; the label is empty on continuation lines."""
    m = bundle.manifest
    cache = m.cache.bytes_per_token()
    numbers = "int8" if m.cache.bits == 8 else "float32"
    sampling = {
        name: value
        for name, value in dataclasses.asdict(m.sampling).items()
        if value != type(m.sampling).__dataclass_fields__[name].default
    }
    return [
        ("bundle", str(bundle.path)),
        ("architecture", f"{m.architecture} (exported via {m.via})"),
        ("parameters", f"{m.parameters / 1e6:.2f} M"),
        ("shapes", ", ".join(f"{name} {value}" for name, value in m.shapes.items())),
        ("vocabulary", f"{m.vocab_size}, start token {m.bos_token}, end tokens {list(m.eos_tokens)}"),
        *_extras(m),
        ("context", f"{m.context} tokens"),
        ("precision", f"{m.quant}, {m.bits_per_weight:.2f} bits per weight with scales"),
        ("on disk", f"{bundle.bytes / 1e6:.2f} MB in {len(m.files)} files, hashes verified"),
        ("memory", f"one request of {m.context} tokens: {_plan(m)}"),
        ("", f"KV cache in {numbers}: {cache} bytes per token, {cache * m.context / 1e6:.1f} MB per full row"),
        ("sampling", ", ".join(f"{name} {value}" for name, value in sampling.items()) or "greedy"),
        ("chat template", "yes" if m.chat_template else "no"),
        ("prompt", "sent as a user message" if m.prompts_are_messages else "completed as plain text"),
        ("prefix", prefix_text(bundle) or "none"),
        *_quality_rows(m),
        ("made with", ", ".join(f"{name} {version}" for name, version in m.made_with.items())),
        ("digest", m.digest),
    ]
