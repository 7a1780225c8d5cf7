"""Plans an export before it is written: the storage of every matrix, and the total size."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edgelm.bundle.manifest import Matrix
from edgelm.errors import EdgelmError

from .calibration.layers import ReferenceModel
from .calibration.sensitivity import measure_sensitivity, relative_error
from .calibration.text_samples import Document
from .graph.decoder_graph import DecoderGraphBuilder
from .graph.initializers import CountedInitializers
from .graph.matrices import matrix_tensors
from .graph.nodes import GraphBuilder
from .int8_kv.int8_cache_graph import CacheScales, convert_cache_to_int8
from .options import ExportOptions
from .progress_callback import ProgressCallback
from .quantize.budget import StorageOption, choose_options
from .quantize.keep import plan_kept_blocks, scale_bits
from .quantize.matrix_plan import MIXED_BITS, QUANTIZED_BITS, QuantPlan, with_bits
from .quantize.spec import KEEP, QuantSpec
from .source_model import SourceModel
from .write.matrix_store import planned_matrix

MARGIN_BYTES: Final = 512
"""Margin for the bytes of a bundle that are known only after it is written."""

SENSITIVITY_TOKENS: Final = 256
"""Positions on which sensitivity is measured; each matrix has its own hidden states of all of them, in every layer."""

MAX_SENSITIVITY_DOCUMENT_TOKENS: Final = 64
"""Maximum of these positions from one document."""


@dataclass(frozen=True, slots=True)
class ExportOutline:
    """What an export would write.

    matrices: how each is stored, in the graph's order. bytes: size of all files, within a few bytes. kl: expected
    divergence in nats, if a budget was given.
    """

    matrices: tuple[Matrix, ...]
    bytes: int
    kl: float | None

    @property
    def matrix_bytes(self) -> int:
        """Bytes of all matrices."""
        return sum(matrix.bytes() for matrix in self.matrices)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of all matrices, with scales and zero points."""
        return 8 * self.matrix_bytes / sum(matrix.rows * matrix.columns for matrix in self.matrices)


def make_plan(
    model: SourceModel,
    options: ExportOptions,
    context: int,
    documents: Sequence[Document] | None,
    progress: ProgressCallback,
) -> tuple[QuantPlan, ExportOutline]:
    """Return how each matrix is stored, and the resulting size.

    documents: the text for measuring sensitivity, if there is a budget. Raises `EdgelmError` for a budget that cannot
    be met.
    """
    plan, kl = _base_plan(model, options), None
    if options.has_budget and documents is not None:
        plan, kl = _plan_within_budget(model, options, context, documents, progress)
    matrices = _matrices(model, plan)
    return plan, ExportOutline(tuple(matrices), _bundle_bytes(model, plan, context, options), kl)


def _base_plan(model: SourceModel, options: ExportOptions) -> QuantPlan:
    """Return the plan of the options, with blocks of 16 for rows whose last block of 32 would be at most half full.

    The codes saved nearly pay for the additional scales. Only if no block size is given.
    """
    if options.quant == "keep":
        return plan_kept_blocks(model.weights)
    plan = options.plan
    if options.block_size is not None or plan.default is None or plan.default.bits != 4:
        return plan
    short = [name for name, (_, columns) in model.weights.matrix_shapes() if 0 < columns % 32 <= 16]
    finer = {name: dataclasses.replace(spec, block_size=16) for name in short if (spec := plan.spec(name)) is not None}
    return QuantPlan(
        plan.default, {**plan.exceptions, **{name: spec for name, spec in finer.items() if spec.bits == 4}}
    )


def _plan_within_budget(
    model: SourceModel, options: ExportOptions, context: int, documents: Sequence[Document], progress: ProgressCallback
) -> tuple[QuantPlan, float]:
    base = _base_plan(model, options)
    if base.default is None:
        raise AssertionError("a budget without quantization")
    layers = ReferenceModel(model.weights, max(len(document) for document in documents))
    probe = QuantPlan(base.default)  # the same for all matrices, so that their divergences can be compared
    measured = measure_sensitivity(layers, _sensitivity_documents(documents), probe, progress)
    candidates = _candidates(base.default, options)
    choices: dict[str, list[StorageOption]] = {}
    weights = 0
    for name, rows in model.weights.matrices():
        weights += rows.shape[0] * rows.shape[1]
        probed = relative_error(rows, probe.spec(name))
        choices[name] = []
        for spec in candidates:
            kl = measured[name] * relative_error(rows, spec) / max(probed, 1e-30)
            choices[name].append(StorageOption(spec, planned_matrix(name, *rows.shape, spec).bytes(), kl))
    limit = None
    if options.max_bytes is None and options.max_kl is None:
        limit = int(weights * MIXED_BITS / 8)
    if options.max_bytes is not None:
        limit = _matrix_budget_bytes(model, base, options, context)
    while True:
        chosen = choose_options(choices, max_bytes=limit, max_kl=options.max_kl)
        plan = QuantPlan(base.default, {name: option.spec for name, option in chosen.items()})
        excess = (
            0
            if options.max_bytes is None
            else _bundle_bytes(model, plan, context, options) + MARGIN_BYTES - options.max_bytes
        )
        if excess <= 0 or limit is None:
            return plan, sum(option.kl for option in chosen.values())
        limit -= excess  # the alignment to pages changes with the plan


def _matrix_budget_bytes(model: SourceModel, plan: QuantPlan, options: ExportOptions, context: int) -> int:
    """Return the bytes left for matrices. Raises `EdgelmError` if there are none."""
    max_bytes = options.max_bytes or 0
    others = (
        _bundle_bytes(model, plan, context, options)
        - sum(matrix.bytes() for matrix in _matrices(model, plan))
        + MARGIN_BYTES
    )
    if others >= max_bytes:
        raise EdgelmError(f"--max-bytes {max_bytes}: tokenizer, norms, tables, graph and prefix take {others} bytes")
    return max_bytes - others


def _candidates(base: QuantSpec, options: ExportOptions) -> list[QuantSpec]:
    """Return the storage choices under a budget: the method stays; bits and block size vary."""
    sizes = [options.block_size] if options.block_size is not None else [16, 32, 64, 128]
    bits = [8] if options.quant == "int8" else QUANTIZED_BITS
    return list(
        dict.fromkeys(with_bits(dataclasses.replace(base, bits=4, block_size=size), b) for b in bits for size in sizes)
    )


def _matrices(model: SourceModel, plan: QuantPlan) -> list[Matrix]:
    matrices = [planned_matrix(name, *shape, plan.spec(name)) for name, shape in model.weights.matrix_shapes()]
    return [
        dataclasses.replace(matrix, scale_bits=scale_bits(model.decoder, matrix.name))
        if matrix.method == KEEP
        else matrix
        for matrix in matrices
    ]


def _bundle_bytes(model: SourceModel, plan: QuantPlan, context: int, options: ExportOptions) -> int:
    """Return the bytes of a plan's files, except for a few bytes that depend on the weights."""
    constants = CountedInitializers("model.onnx.data")
    matrices = {matrix.name: matrix for matrix in _matrices(model, plan)}
    for matrix in matrices.values():
        for name, dtype, shape in matrix_tensors(matrix):
            constants.add_shape(name, dtype, shape)
    graph = DecoderGraphBuilder(model.weights, matrices, context, GraphBuilder(constants)).build()
    if options.kv == "int8":
        d = model.decoder
        ones = np.ones((d.kv_heads, d.padded_head_size), np.float32)
        convert_cache_to_int8(graph, [CacheScales(ones, ones)] * len(d.layers))
    vocabulary = 0 if model.vocabulary is None else len(json.dumps(model.vocabulary.kept_ids.tolist()))
    prefix = len(model.prefix_tokens) * model.decoder.cache.bytes_per_token()
    return constants.total_bytes + int(graph.ByteSize()) + len(model.tokenizer_text.encode()) + vocabulary + prefix


def _sensitivity_documents(documents: Sequence[Document]) -> list[Document]:
    """Return beginnings of documents at even distances, `SENSITIVITY_TOKENS` tokens in total."""
    count = min(len(documents), SENSITIVITY_TOKENS // MAX_SENSITIVITY_DOCUMENT_TOKENS)
    length = max(MAX_SENSITIVITY_DOCUMENT_TOKENS, SENSITIVITY_TOKENS // count)
    return [documents[i * len(documents) // count][:length] for i in range(count)]
