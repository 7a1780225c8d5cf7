"""The road of a model: checkpoint -> plan -> stored matrices -> graph -> manifest -> measured -> renamed into place."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgelm.bundle import MANIFEST, Bundle, Cache, Manifest, open_bundle, seal
from edgelm.errors import EdgelmError

from . import metadata
from .compare import VOCABULARY
from .decoder import Decoder
from .documents import Document, calibration_documents, measured_documents, read_text
from .graph import DecoderGraph
from .initializers import Initializers
from .nodes import Nodes
from .opened import Opened, open_model, pruned, vocabulary_facts
from .options import Options
from .planning import Outline, make_plan
from .staging import staged
from .storing import MatrixStore, store_matrices
from .verify import CheckpointReference, check, measure, quality

CONTEXT = 4096
"""Default limit of the context: a longer one costs memory for every request, and rotary tables on disk."""

REPORT = "report.svg"

Progress = Callable[[str, int, int], None]
"""Told (what, done, of) as the export goes."""


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Bundle:
    """Write the bundle of a Hugging Face checkpoint.

    Parameters
    ----------
    checkpoint
        A directory or a hub id (owner/name).
    out
        The bundle's directory. An existing one is refused unless `force`; a failed export leaves nothing behind.
    progress
        Called with (what, done, of).
    quant
        `int4` (the default), `int8`, `fp32`, or `mixed`: int4 and int8, each matrix by its measured sensitivity, at
        most 5.5 bits a weight unless `max_bytes` or `max_kl` says otherwise.
    block_size, symmetric
        Weights that share a scale: 16, 32 (the default), 64 or 128; and whether blocks have no zero point (True).
    method
        How codes are chosen: `rtn` rounds to nearest, `clip` searches the scale of least squared error, `hqq` is
        half-quadratic quantization, `gptq` is second-order and needs `calibrate`. `auto`: gptq with calibration text,
        else clip; rtn for int8.
    calibrate
        A text file like what the model will see; up to 65,536 tokens of it are used.
    context
        Positions of the longest conversation; the default is the checkpoint's, at most 4096.
    adapter
        A LoRA adapter of PEFT's format to merge: a directory or a hub id.
    vocab, vocab_size
        A text file of the domain, and how many tokens to keep for it.
    verify, max_kl, min_agreement
        A text file to measure the bundle on beside the checkpoint, and what it must reach: the mean KL divergence in
        nats, the share of positions in (0, 1] with the same likeliest token. `max_kl` is also a budget: matrices of an
        int4 export are upgraded until it is met.
    max_bytes
        Size that the bundle's files may have together.
    report
        Whether to plot each matrix's error and size into report.svg.
    via
        `native` builds the graph itself; `optimum` converts optimum's export of any causal model.

    Raises
    ------
    CheckpointError
        The checkpoint is incomplete, damaged or of an unsupported architecture.
    EdgelmError
        The target exists, cannot be written, an option is out of range, or a limit is not met.
    """
    chosen = Options(**options)
    told = progress or (lambda _what, _done, _of: None)
    with staged(Path(out), force=force, replaceable=lambda path: (path / MANIFEST).is_file()) as stage:
        if chosen.via == "optimum":
            from .optimum import export_optimum  # heavy: torch, transformers

            export_optimum(checkpoint, stage, chosen, told)
        else:
            _export(checkpoint, stage, chosen, told)
        size = open_bundle(stage, verify=False).bytes
        if chosen.max_bytes is not None and size > chosen.max_bytes:
            raise EdgelmError(f"the bundle has {size} bytes, --max-bytes allows {chosen.max_bytes}")
    return open_bundle(out)


def outline(checkpoint: str | Path, *, progress: Progress | None = None, **options: Any) -> Outline:
    """Return what `export` with the same options would write, without writing it. Raises as `export` does."""
    chosen = Options(**options)
    if chosen.via == "optimum":
        raise EdgelmError("--dry-run does not go with --via optimum: only optimum's export shows what it will be")
    model = _open(checkpoint, chosen)
    length = choose_context(chosen.context, model.decoder.context)
    told = progress or (lambda _what, _done, _of: None)
    return make_plan(model, chosen, length, _calibration(model, chosen, length), told)[1]


def choose_context(wanted: int | None, limit: int) -> int:
    """Return the bundle's context: what was asked for, else the checkpoint's up to `CONTEXT`."""
    if wanted is None:
        return min(limit, CONTEXT)
    if not 1 <= wanted <= limit:
        raise EdgelmError(f"context must lie in [1, {limit}], the checkpoint's own limit; got {wanted}")
    return wanted


def _open(checkpoint: str | Path, options: Options) -> Opened:
    model = open_model(checkpoint, options.adapter)
    if options.vocab is None or options.vocab_size is None:
        return model
    return pruned(model, options.vocab, options.vocab_size)


def _export(checkpoint: str | Path, stage: Path, options: Options, progress: Progress) -> None:
    model = _open(checkpoint, options)
    length = choose_context(options.context, model.decoder.context)
    documents = _calibration(model, options, length)
    measured = _measured(model, options, length)
    plan, outline = make_plan(model, options, length, documents, progress)
    (stage / "tokenizer.json").write_text(model.tokenizer_text, encoding="utf-8")
    if model.vocabulary is not None:
        (stage / VOCABULARY).write_text(json.dumps(model.vocabulary.kept.tolist()), encoding="utf-8")
    with Initializers(stage / "model.onnx.data") as initializers:
        store = MatrixStore(model.weights, plan, initializers, progress, outline.matrix_bytes, measure=options.report)
        store_matrices(store, documents if plan.is_calibrated else None)
        graph = DecoderGraph(model.weights, store.matrices, length, Nodes(initializers)).build()
    (stage / "model.onnx").write_bytes(graph.SerializeToString(deterministic=True))
    if options.report:
        from .report import plot  # heavy: matplotlib

        plot(stage / REPORT, tuple(store.matrices.values()), store.errors)
    manifest = seal(stage, _manifest(model, options, length, store))
    if measured is not None and options.verify is not None:
        reference = CheckpointReference(model.weights, progress)
        agreement = measure(Bundle(stage, manifest), reference, measured, progress)
        check(agreement, options.max_kl, options.min_agreement)
        seal(stage, replace(manifest, quality=quality(agreement, Path(options.verify).name)))


def _calibration(model: Opened, options: Options, context: int) -> Sequence[Document] | None:
    """Return the documents that calibration and sensitivity look at, where either is wanted."""
    if not options.has_budget and options.calibrate is None:
        return None
    file, flag = (options.calibrate, "--calibrate") if options.calibrate is not None else (options.verify, "--verify")
    if file is None:
        raise AssertionError("a budget without text")
    return calibration_documents(read_text(file, flag), model.tokenizer, model.bos_token, context, flag)


def _measured(model: Opened, options: Options, context: int) -> Sequence[Document] | None:
    if options.verify is None:
        return None
    return measured_documents(read_text(options.verify, "--verify"), model.tokenizer, model.bos_token, context)


def _manifest(model: Opened, options: Options, context: int, store: MatrixStore) -> Manifest:
    d, checkpoint = model.decoder, model.checkpoint
    matrices = tuple(store.matrices.values())
    tables = [matrix for matrix in matrices if matrix.name in ("embedding", "head")]
    return Manifest(
        architecture=str(checkpoint.config["model_type"]),
        context=context,
        vocab_size=d.vocab_size,
        cache=Cache("shared", len(d.layers), d.kv_heads, d.padded_head_size),
        quant=options.quant if len({matrix.bits for matrix in matrices}) == 1 else "mixed",
        matrices=matrices,
        bos_token=model.bos_token,
        eos_tokens=model.eos_tokens,
        parameters=d.parameters,
        shapes=_shapes(d),
        sampling=metadata.sampling(checkpoint),
        chat_template=metadata.chat_template(checkpoint),
        special_tokens=metadata.special_tokens(checkpoint),
        made_with=metadata.made_with(),
        vocabulary=vocabulary_facts(model, sum(matrix.bytes() for matrix in tables) / d.vocab_size),
        adapter=None if options.adapter is None else Path(options.adapter).name,
        long_from=d.long_from(context),
    )


def _shapes(d: Decoder) -> dict[str, int]:
    return {
        "hidden_size": d.hidden_size,
        "layers": len(d.layers),
        "heads": d.heads,
        "kv_heads": d.kv_heads,
        "head_size": d.head_size,
        "mlp_size": d.mlp_size,
    }
