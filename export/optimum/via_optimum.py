"""Exports architectures without a module in `architectures/`: optimum's export, then our quantizer.

Needs torch, transformers and optimum-onnx, and holds the whole model in memory as float32. The graph keeps optimum's
nodes and its growing KV cache, so it is larger and slower than the graphs that we build.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from onnx import TensorProto

from edgelm.bundle.bundle_folder import Bundle, write_manifest
from edgelm.bundle.manifest import KVCacheShape, Manifest
from edgelm.errors import CheckpointError, EdgelmError
from edgelm.system.installation import install_command, missing_extra
from edgelm.text.documents import read_text
from edgelm.text.tokenizer import Tokenizer

from ..calibration.text_samples import evaluation_documents
from ..checkpoint import Checkpoint, Safetensors, metadata, open_checkpoint
from ..checkpoint.transformers_config import SAFE_LOAD_OPTIONS, read_safe_config
from ..graph.initializers import FileInitializers
from ..graph.onnx_graph import OnnxGraph, value_shape
from ..options import DEFAULT_CONTEXT, ExportOptions, choose_context
from ..progress_callback import ProgressCallback
from ..quantize.matrix_plan import Quant, QuantPlan
from ..verify.quality_gate import BundlePredictor, check_agreement, measure_agreement, quality_facts
from ..verify.self_check import raise_if_broken, self_check
from .requantize import OnnxQuantizer

TASK: Final = "text-generation-with-past"
SUPPORTED_INPUTS: Final = {"input_ids", "attention_mask", "position_ids"}
"""Inputs besides the KV cache that the runtime's dynamic runner can feed."""

CONTEXT_ATTRIBUTES: Final = ("max_position_embeddings", "max_seq_len", "seq_length")
"""Attributes of a configuration that may hold the number of positions; the first one present is used."""

SHAPES: Final = {
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_size": "intermediate_size",
}
"""Names in a manifest, and the attributes of a transformers configuration with these values."""


@dataclass(frozen=True, slots=True)
class _Libraries:
    torch: ModuleType
    transformers: ModuleType
    exporter: ModuleType
    configs: ModuleType


def export_via_optimum(
    source: str | Path, stage: Path, options: ExportOptions, progress: ProgressCallback, *, force: bool
) -> None:
    """Write a whole bundle into `stage` and check it as the options require. Raises as `edgelm_export.export` does."""
    manifest = write_manifest(
        stage, convert_checkpoint(source, stage, options.plan, options.quant, options.context, progress)
    )
    if options.verify is None and options.quant == "fp32":
        return
    bundle = Bundle(stage, manifest)
    tokenizer = Tokenizer.from_file(bundle.tokenizer)
    documents = None
    if options.verify is not None:
        text = read_text(options.verify, "--verify")
        documents = evaluation_documents(text, tokenizer, manifest.bos_token, manifest.context)
    measured: dict[str, Any] = {}
    with reference_bundle(source, stage, manifest.context, progress) as beside:
        reference = BundlePredictor(beside)
        if options.quant != "fp32":
            measured["self_check"] = self_check(bundle, reference, tokenizer, progress)
            if not force:
                raise_if_broken(measured["self_check"])
        if documents is not None and options.verify is not None:
            agreement = measure_agreement(bundle, reference, documents.documents, progress)
            check_agreement(agreement, options.max_kl, options.min_agreement)
            measured["quality"] = quality_facts(agreement, Path(options.verify).name, documents.left_out_tokens)
    write_manifest(stage, replace(manifest, **measured))


@contextmanager
def reference_bundle(source: str | Path, beside: Path, context: int, progress: ProgressCallback) -> Iterator[Bundle]:
    """Yield the float32 bundle of a checkpoint in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix=".reference.", dir=beside) as folder:
        path = Path(folder)
        yield Bundle(
            path, write_manifest(path, convert_checkpoint(source, path, QuantPlan(None), "fp32", context, progress))
        )


def convert_checkpoint(
    source: str | Path, stage: Path, plan: QuantPlan, quant: Quant, context: int | None, progress: ProgressCallback
) -> Manifest:
    """Write model.onnx, its data and tokenizer.json into `stage`; return the manifest.

    Raises `CheckpointError` for a checkpoint that optimum cannot export or the runtime cannot feed, and
    `MissingExtraError` if optimum-onnx, transformers or torch is not installed.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.is_quantized:
        raise CheckpointError(f"{checkpoint.path} is already quantized; export the checkpoint that it was made from")
    if checkpoint.notes:
        raise CheckpointError(f"{checkpoint.path} cannot be exported via optimum: {'; '.join(checkpoint.notes)}")
    if not isinstance(checkpoint.tensors, Safetensors):
        raise CheckpointError(f"{source}: --via optimum reads Hugging Face checkpoints only")
    with _quiet():
        libraries = _import()
        model = _load(checkpoint, libraries)
    parameters, config = int(model.num_parameters()), model.config
    length = _context(config, context)
    progress("tracing", 0, 1)  # the longest part; optimum does not report progress
    with tempfile.TemporaryDirectory(prefix="optimum.", dir=stage) as traced:
        with _quiet():
            file = _trace(model, Path(traced), libraries)
        del model
        graph = OnnxGraph(file)
        cache, vocab_size = _cache(graph), _vocab_size(graph)
        with FileInitializers(stage / "model.onnx.data") as initializers:
            quantizer = OnnxQuantizer(graph, plan, initializers, progress)
            quantized = quantizer.build()
    quantizable = sum(matrix.rows * matrix.columns for matrix in quantizer.matrices)
    if plan.default is not None and 2 * quantizable < parameters:
        raise CheckpointError(
            f"only {quantizable} of the {parameters} weights of this {config.model_type} model are matrices that can be"
            f" quantized; use --quant fp32"
        )
    (stage / "model.onnx").write_bytes(quantized.SerializeToString(deterministic=True))
    (stage / "tokenizer.json").write_text(checkpoint.tokenizer_text, encoding="utf-8")
    return Manifest(
        architecture=str(checkpoint.config["model_type"]),
        context=length,
        vocab_size=vocab_size,
        cache=cache,
        quant=quant,
        matrices=tuple(quantizer.matrices),
        bos_token=metadata.bos_token(checkpoint),
        eos_tokens=metadata.eos_tokens(checkpoint),
        parameters=parameters,
        shapes=_shapes(config, cache),
        sampling=metadata.sampling(checkpoint),
        chat_template=metadata.chat_template(checkpoint),
        bare_prompt=metadata.bare_prompt(checkpoint),
        special_tokens=metadata.special_tokens(checkpoint),
        made_with={
            **metadata.library_versions(),
            **{name: version(name) for name in ("optimum", "optimum-onnx", "torch", "transformers")},
        },
        via="optimum",
    )


def _import() -> _Libraries:
    try:
        names = ("torch", "transformers", "optimum.exporters.onnx", "optimum.exporters.onnx.model_configs")
        return _Libraries(*map(import_module, names))
    except ModuleNotFoundError as error:
        raise missing_extra("edgelm export --via optimum", "optimum", error.name or "optimum") from error
    except ImportError as error:
        raise EdgelmError(f"optimum cannot be imported: {_reason(error)}; {install_command('optimum')}") from error


def _load(checkpoint: Checkpoint, libraries: _Libraries) -> Any:
    """Return the checkpoint as a float32 transformers model."""
    kind = checkpoint.config.get("model_type")
    supported = sorted(libraries.configs.TasksManager.get_supported_model_type_for_task(TASK, "onnx"))
    if not isinstance(kind, str) or kind.replace("_", "-") not in {name.replace("_", "-") for name in supported}:
        raise CheckpointError(
            f"architecture {kind!r} is not supported by optimum-onnx {version('optimum-onnx')} for text generation;"
            f" supported: {', '.join(supported)}"
        )
    config = read_safe_config(libraries.transformers, checkpoint.path)
    try:
        model, loading = libraries.transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.path, config=config, dtype=libraries.torch.float32, output_loading_info=True, **SAFE_LOAD_OPTIONS
        )
    except Exception as error:  # the libraries raise many unrelated types
        raise CheckpointError(f"transformers cannot load {checkpoint.path}: {_reason(error)}") from error
    for what, key in (("has no tensor", "missing_keys"), ("has another shape for", "mismatched_keys")):
        if found := sorted(map(str, loading.get(key, ()))):  # transformers would continue with random weights
            raise CheckpointError(f"{checkpoint.path} {what} {found[0]} ({len(found)} in all); is it complete?")
    return model


def _trace(model: Any, out: Path, libraries: _Libraries) -> Path:
    """Export with optimum; return the ONNX file."""
    kind = model.config.model_type
    model.config.use_cache = True
    try:
        libraries.exporter.onnx_export_from_model(
            model=model, output=out, task=TASK, do_validation=False, no_post_process=True
        )
    except Exception as error:  # the libraries raise many unrelated types
        raise CheckpointError(f"optimum cannot export the {kind} model: {_reason(error)}") from error
    file = out / "model.onnx"
    if not file.is_file():
        raise CheckpointError(f"optimum's export of the {kind} model is not a single model.onnx")
    return file


def _cache(graph: OnnxGraph) -> KVCacheShape:
    """Return the KV cache's shape in the graph. Raises `CheckpointError` for inputs that the runtime cannot feed."""
    past = [name for name in graph.inputs if name.startswith("past_key_values.")]
    layers = len(past) // 2
    expected = {f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")}
    unknown = sorted((set(graph.inputs) - SUPPORTED_INPUTS - expected) | (expected - set(graph.inputs)))
    if unknown or "input_ids" not in graph.inputs or not layers:
        raise CheckpointError(
            f"the exported graph has inputs that edgelm cannot feed: {', '.join(unknown) or 'no cache'}"
        )
    shapes = {tuple(value_shape(graph.inputs[name])) for name in past}
    kinds = {graph.inputs[name].type.tensor_type.elem_type for name in past}
    shape = shapes.pop()
    if shapes or kinds != {TensorProto.FLOAT} or len(shape) != 4 or shape[1] is None or shape[3] is None:
        raise CheckpointError(
            "the exported graph's cache is not float32 [batch, heads, positions, size] in every layer"
        )
    return KVCacheShape("growing", layers, shape[1], shape[3])


def _vocab_size(graph: OnnxGraph) -> int:
    size = value_shape(graph.outputs["logits"])[-1] if "logits" in graph.outputs else None
    if size is None:
        raise CheckpointError("the exported graph has no output logits of a known width")
    return size


def _context(config: Any, wanted: int | None) -> int:
    """Return the bundle's context. It ends before a sliding window does: the cache cannot drop old positions."""
    limit = next(
        (value for name in CONTEXT_ATTRIBUTES if isinstance(value := getattr(config, name, None), int)), DEFAULT_CONTEXT
    )
    window = getattr(config, "sliding_window", None)
    return choose_context(wanted, limit if not window else min(limit, window - 1))


def _shapes(config: Any, cache: KVCacheShape) -> dict[str, int]:
    values = {name: getattr(config, attribute, None) for name, attribute in SHAPES.items()}
    known = {name: value for name, value in values.items() if isinstance(value, int)}
    return {**known, "kv_heads": cache.kv_heads, "head_size": cache.head_size}


def _reason(error: BaseException) -> str:
    """Return the first sentence of a library's message, one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". ")[0].rstrip(".")[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the libraries' log lines, warnings and progress bars, for the whole process."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)
