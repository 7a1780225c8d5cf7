"""Matrices, graph and tokenizer of a bundle into a directory, and the manifest that says what they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edgelm.bundle.manifest import Manifest, Matrix

from ..architectures.decoder import Decoder
from ..calibration.text_samples import Document
from ..checkpoint import metadata
from ..graph.decoder_graph import DecoderGraph
from ..graph.initializers import Initializers
from ..graph.nodes import Nodes
from ..progress_callback import Progress
from ..quantize.matrix_plan import TABLES, Plan, Quant
from ..source_model import VOCABULARY, Opened, vocabulary_facts
from .matrix_store import MatrixStore, store_matrices

REPORT = "report.svg"


def write_bundle(
    folder: Path,
    model: Opened,
    plan: Plan,
    quant: Quant,
    context: int,
    progress: Progress,
    *,
    total: int = 0,
    documents: Sequence[Document] | None = None,
    report: bool = False,
) -> Manifest:
    """Write everything of a bundle but the manifest, which is returned without hashes.

    `total` are the matrices' bytes to be, for the progress; calibrated plans need `documents`. Raises as
    `edgelm_export.export` does.
    """
    (folder / "tokenizer.json").write_text(model.tokenizer_text, encoding="utf-8")
    if model.vocabulary is not None:
        (folder / VOCABULARY).write_text(json.dumps(model.vocabulary.kept.tolist()), encoding="utf-8")
    with Initializers(folder / "model.onnx.data") as initializers:
        store = MatrixStore(model.weights, plan, initializers, progress, total, measure=report)
        store_matrices(store, documents if plan.is_calibrated else None)
        graph = DecoderGraph(model.weights, store.matrices, context, Nodes(initializers)).build()
    (folder / "model.onnx").write_bytes(graph.SerializeToString(deterministic=True))
    if report:
        from .plot import plot  # heavy: matplotlib

        plot(folder / REPORT, tuple(store.matrices.values()), store.errors)
    return _manifest(model, quant, context, store)


def _manifest(model: Opened, quant: Quant, context: int, store: MatrixStore) -> Manifest:
    d, checkpoint = model.decoder, model.checkpoint
    matrices = tuple(store.matrices.values())
    tables = [matrix for matrix in matrices if matrix.name in TABLES]
    return Manifest(
        architecture=str(checkpoint.config["model_type"]),
        context=context,
        vocab_size=d.vocab_size,
        cache=d.cache,
        quant=_precision(quant, matrices),
        matrices=matrices,
        bos_token=model.bos_token,
        eos_tokens=model.eos_tokens,
        parameters=d.parameters,
        shapes=_shapes(d),
        sampling=metadata.sampling(checkpoint),
        chat_template=metadata.chat_template(checkpoint),
        bare_prompt=metadata.bare_prompt(checkpoint),
        special_tokens=metadata.special_tokens(checkpoint),
        made_with={**metadata.made_with(), **checkpoint.read_with},
        vocabulary=vocabulary_facts(model, sum(matrix.bytes() for matrix in tables) / d.vocab_size),
        adapter=model.adapter,
        long_from=d.long_from(context),
        notes=checkpoint.notes,
    )


def _precision(quant: Quant, matrices: Sequence[Matrix]) -> str:
    """Return what the manifest calls the precision of all matrices together, embedding and head left out."""
    bits = {matrix.bits for matrix in matrices if matrix.name not in TABLES}
    if len(bits) > 1:
        return "mixed"
    return f"int{min(bits)}" if quant == "keep" else quant


def _shapes(d: Decoder) -> dict[str, int]:
    return {
        "hidden_size": d.hidden_size,
        "layers": len(d.layers),
        "heads": d.heads,
        "kv_heads": d.kv_heads,
        "head_size": d.head_size,
        "mlp_size": d.mlp_size,
    }
