"""The road of a model: checkpoint -> plan -> quantized graph -> tokenizer, manifest -> rename into place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from edgelm.bundle import MANIFEST, Bundle, Cache, Manifest, open_bundle, seal
from edgelm.errors import EdgelmError

from . import metadata
from .architectures import find_family
from .checkpoint import Checkpoint, open_checkpoint
from .decoder import Decoder
from .graph import DecoderGraph
from .initializers import Initializers
from .nodes import Nodes
from .quantize.plan import BITS, BLOCK_SIZES, Plan, Quant, default_block_size
from .quantize.spec import METHODS, Method, Spec
from .staging import staged
from .storing import store_matrices
from .weights import Weights

CONTEXT = 4096
"""Default limit of the context: a longer one costs memory for every request, and rotary tables on disk."""

Progress = Callable[[str, int, int], None]
"""Told (what, done, of) as the export goes."""


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    quant: Quant = "int4",
    block_size: int | None = None,
    method: Literal["auto", "rtn", "clip"] = "auto",
    context: int | None = None,
    via: Literal["native", "optimum"] = "native",
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write the bundle of a Hugging Face checkpoint.

    Parameters
    ----------
    checkpoint
        A directory or a hub id (owner/name).
    out
        The bundle's directory. An existing one is refused unless `force`; a failed export leaves nothing behind.
    quant, block_size, method
        Precision of the matrices, weights per scale (32, 64 or 128; by default 64 from a width of 512 on, else 32, and
        32 via optimum), and how scales are chosen: `rtn` rounds to nearest, `clip` searches the scale of least squared
        error; `auto` is `clip` for int4 and `rtn` for int8.
    context
        Positions of the longest conversation; the default is the checkpoint's, at most 4096.
    via
        `native` builds the graph itself; `optimum` converts optimum's export of any causal model.
    progress
        Called with (what, done, of).

    Raises
    ------
    CheckpointError
        The checkpoint is incomplete, damaged or of an unsupported architecture.
    EdgelmError
        The target exists, cannot be written, or an option is out of range.
    """
    plan = _plan(quant, 32 if block_size is None else block_size, method)
    with staged(Path(out), force=force, replaceable=lambda path: (path / MANIFEST).is_file()) as stage:
        if via == "optimum":
            from .optimum import convert  # heavy: torch, transformers

            manifest = convert(checkpoint, stage, plan, quant, context, progress)
        else:
            source = open_checkpoint(checkpoint)
            if block_size is None:
                width = find_family(source.config).decoder(source.config).hidden_size
                plan = _plan(quant, default_block_size(width), method)
            manifest = _build(source, stage, plan, quant, context, progress)
        seal(stage, manifest)
    return open_bundle(out)


def _plan(quant: Quant, block_size: int, method: Literal["auto"] | Method) -> Plan:
    if quant not in BITS:
        raise EdgelmError(f"quant must be one of {', '.join(BITS)}, got {quant!r}")
    if block_size not in BLOCK_SIZES:
        raise EdgelmError(f"block size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    if method != "auto" and method not in METHODS:
        raise EdgelmError(f"method must be one of auto, {', '.join(METHODS)}, got {method!r}")
    chosen: Method = method if method != "auto" else "clip" if quant == "int4" else "rtn"
    return Plan(None if quant == "fp32" else Spec(BITS[quant], block_size, True, chosen))


def _build(checkpoint: Checkpoint, stage: Path, plan: Plan, quant: Quant, context: int | None, progress: Progress | None) -> Manifest:
    family = find_family(checkpoint.config)
    decoder = family.decoder(checkpoint.config)
    length = choose_context(context, decoder.context)
    metadata.check_tokenizer(checkpoint, decoder.vocab_size)
    shutil.copyfile(checkpoint.tokenizer, stage / "tokenizer.json")
    weights = Weights(checkpoint, decoder, family.names)
    with Initializers(stage / "model.onnx.data") as initializers:
        matrices = store_matrices(weights, plan, initializers, progress or (lambda _what, _done, _of: None))
        model = DecoderGraph(weights, matrices, length, Nodes(initializers)).build()
    (stage / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    return Manifest(
        architecture=family.model_type,
        context=length,
        vocab_size=decoder.vocab_size,
        cache=Cache("shared", len(decoder.layers), decoder.kv_heads, decoder.padded_head_size),
        quant=quant,
        matrices=tuple(matrices.values()),
        bos_token=metadata.bos_token(checkpoint),
        eos_tokens=metadata.eos_tokens(checkpoint),
        parameters=count_parameters(decoder),
        shapes={
            "hidden_size": decoder.hidden_size,
            "layers": len(decoder.layers),
            "heads": decoder.heads,
            "kv_heads": decoder.kv_heads,
            "head_size": decoder.head_size,
            "mlp_size": decoder.mlp_size,
        },
        sampling=metadata.sampling(checkpoint),
        chat_template=metadata.chat_template(checkpoint),
        special_tokens=metadata.special_tokens(checkpoint),
        made_with=metadata.made_with(),
        long_from=decoder.long_from(length),
    )


def choose_context(wanted: int | None, limit: int) -> int:
    """Return the bundle's context: what was asked for, else the checkpoint's up to `CONTEXT`."""
    if wanted is None:
        return min(limit, CONTEXT)
    if not 1 <= wanted <= limit:
        raise EdgelmError(f"context must lie in [1, {limit}], the checkpoint's own limit; got {wanted}")
    return wanted


def count_parameters(d: Decoder) -> int:
    """Return the number of weights of the checkpoint, padding not counted, a tied head once."""
    heads = (d.heads + 2 * d.kv_heads) * d.head_size
    layer = d.hidden_size * (heads + d.heads * d.head_size + 3 * d.mlp_size)
    layer += d.hidden_size * 2 * (d.pre_norm + d.post_norm)
    layer += {None: 0, "head": 2, "projection": d.heads + d.kv_heads}[d.qk_norm] * d.head_size
    layer += d.qkv_bias * heads + d.output_bias * d.hidden_size + d.mlp_bias * (2 * d.mlp_size + d.hidden_size)
    return d.vocab_size * d.hidden_size * (1 if d.tied else 2) + len(d.layers) * layer + d.hidden_size
