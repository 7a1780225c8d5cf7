"""Writes the matrices, graph and tokenizer of a bundle, and builds its manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edgelm.bundle.manifest import Manifest, Matrix

from ..architectures.decoder import DecoderConfig
from ..calibration.text_samples import Document
from ..checkpoint import metadata
from ..graph.decoder_graph import DecoderGraphBuilder
from ..graph.initializers import FileInitializers
from ..graph.nodes import GraphBuilder
from ..progress_callback import ProgressCallback
from ..quantize.matrix_plan import TOKEN_MATRICES, Quant, QuantPlan
from ..source_model import VOCABULARY, SourceModel, vocabulary_facts
from .matrix_store import MatrixWriter, store_matrices

REPORT = "report.svg"


def write_bundle(
    folder: Path,
    model: SourceModel,
    plan: QuantPlan,
    quant: Quant,
    context: int,
    progress: ProgressCallback,
    *,
    total: int = 0,
    documents: Sequence[Document] | None = None,
    report: bool = False,
) -> Manifest:
    """Write all files of a bundle except the manifest; return the manifest without hashes.

    total: expected bytes of all matrices, for the progress. documents: required if the plan has calibrated matrices.
    Raises as `edgelm_export.export` does.
    """
    (folder / "tokenizer.json").write_text(model.tokenizer_text, encoding="utf-8")
    if model.vocabulary is not None:
        (folder / VOCABULARY).write_text(json.dumps(model.vocabulary.kept_ids.tolist()), encoding="utf-8")
    with FileInitializers(folder / "model.onnx.data") as initializers:
        store = MatrixWriter(model.weights, plan, initializers, progress, total, measure=report)
        store_matrices(store, documents if plan.is_calibrated else None)
        graph = DecoderGraphBuilder(model.weights, store.matrices, context, GraphBuilder(initializers)).build()
    (folder / "model.onnx").write_bytes(graph.SerializeToString(deterministic=True))
    if report:
        from .plot import plot_report  # heavy: matplotlib

        plot_report(folder / REPORT, tuple(store.matrices.values()), store.errors)
    return _manifest(model, quant, context, store)


def _manifest(model: SourceModel, quant: Quant, context: int, store: MatrixWriter) -> Manifest:
    d, checkpoint = model.decoder, model.checkpoint
    matrices = tuple(store.matrices.values())
    tables = [matrix for matrix in matrices if matrix.name in TOKEN_MATRICES]
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
        made_with={**metadata.library_versions(), **checkpoint.library_versions},
        vocabulary=vocabulary_facts(model, sum(matrix.bytes() for matrix in tables) / d.vocab_size),
        adapter=model.adapter_name,
        long_from=d.long_from(context),
        notes=checkpoint.notes,
    )


def _precision(quant: Quant, matrices: Sequence[Matrix]) -> str:
    """Return the manifest's precision of all matrices except embedding and head."""
    bits = {matrix.bits for matrix in matrices if matrix.name not in TOKEN_MATRICES}
    if len(bits) > 1:
        return "mixed"
    return f"int{min(bits)}" if quant == "keep" else quant


def _shapes(d: DecoderConfig) -> dict[str, int]:
    return {
        "hidden_size": d.hidden_size,
        "layers": len(d.layers),
        "heads": d.heads,
        "kv_heads": d.kv_heads,
        "head_size": d.head_size,
        "mlp_size": d.mlp_size,
    }
