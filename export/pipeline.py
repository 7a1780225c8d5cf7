"""The export as one function: checkpoint -> plan -> matrices and graph -> manifest -> checks -> rename into place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgelm.bundle.bundle_folder import Bundle, open_bundle, write_manifest
from edgelm.bundle.manifest import MANIFEST
from edgelm.errors import EdgelmError
from edgelm.runtime.ort import check_ort_version
from edgelm.runtime.prefix_file import add_prefix
from edgelm.text.documents import read_text
from edgelm.text.static_prompt import PrefixText, read_prefix_text, tokenize_prefix
from edgelm.text.tokenizer import Tokenizer

from .calibration.text_samples import (
    Document,
    EvaluationText,
    calibration_documents,
    calibration_token_count,
    evaluation_documents,
)
from .int8_kv.int8_cache_graph import MIN_ONNXRUNTIME
from .int8_kv.quantize_cache import quantize_kv_cache
from .options import SELF_GENERATED, ExportOptions, choose_context
from .plan import ExportOutline, make_plan
from .progress_callback import ProgressCallback, ignore_progress
from .self_generated import sample_calibration_documents
from .source_model import SourceModel, open_source_model, prune_model, with_static_prefix
from .verify.quality_gate import CheckpointPredictor, check_agreement, measure_agreement, quality_facts
from .verify.self_check import raise_if_broken, self_check
from .write.bundle import write_bundle
from .write.staging import staged_directory


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> Bundle:
    """Write the bundle of a checkpoint.

    Parameters
    ----------
    checkpoint
        A Hugging Face directory, a GGUF file (the first part of a split one), `ollama:NAME[:TAG]` of a local Ollama
        store, or a hub id (owner/name).
    out
        The bundle's directory. A failed export leaves nothing behind.
    force
        Replace an existing bundle, and write a bundle that fails the self-check.
    progress
        Called with (what, done, of).
    quant
        `int4` (the default; embedding and head have 5 bits), `int5` (the default with `fast`), `int6`, `int8`, `fp32`;
        `mixed`: 4 to 8 bits by the measured sensitivity of each matrix, at most 5.5 bits per weight unless
        `max_bytes` or `max_kl` is given; `keep`: copy the Q4_0 and Q8_0 blocks of a GGUF file, int8 for matrices in
        other formats.
    block_size, symmetric
        Weights that share a scale: 16, 32 (the default), 64 or 128. Whether blocks have no zero point (True).
    method
        How codes are chosen: a module of `edgelm_export.quantize.methods`, or `auto`: gptq; clip with `fast`; rtn for
        int8.
    calibrate
        A text file similar to the model's later inputs, or `self`: self-generated text, the default except for int8.
    fast
        Quantize without calibration: seconds instead of minutes.
    embedding_bits
        Bits of embedding and head: 4, 5, 6 or 8.
    context
        Maximum positions of a conversation. Default: the checkpoint's, at most 4096.
    adapter
        A LoRA adapter in PEFT's format to merge: a directory or a hub id.
    vocab, vocab_size
        A text file of the domain, and the number of tokens to keep for it.
    verify, max_kl, min_agreement
        A text file on which the bundle is compared with the checkpoint, and limits for the result: the mean KL
        divergence in nats, and the share in (0, 1] of positions with the same most likely token. `max_kl` is also a
        budget: matrices of an int4 export get more bits until it is met.
    max_bytes
        Maximum size of the bundle's files together.
    prefix
        A file with the beginning of every prompt, text or messages (`edgelm.text.static_prompt`). Its keys and values
        become part of the bundle.
    report
        Plot the error and size of each matrix into report.svg.
    kv
        Storage of keys and values at run time: `fp32` (the default) or `int8`, a quarter of the memory. The scales of
        int8 come from `calibrate`, otherwise from 8,192 self-generated tokens.
    via
        `native` builds the graph; `optimum` converts optimum's export of any causal model.

    Raises
    ------
    CheckpointError
        The checkpoint is incomplete, damaged or of an unsupported architecture.
    SelfCheckError
        The bundle predicts so much worse than the checkpoint that it is unusable.
    EdgelmError
        The target exists or cannot be written, an option is out of range, or a limit is not met.
    """
    chosen = _checked(options)
    on_progress = progress or ignore_progress
    opening = None if chosen.prefix is None else read_prefix_text(chosen.prefix)
    with staged_directory(Path(out), force=force, is_replaceable=lambda path: (path / MANIFEST).is_file()) as stage:
        if chosen.via == "optimum":
            from .optimum.via_optimum import export_via_optimum  # heavy: torch, transformers

            export_via_optimum(checkpoint, stage, chosen, on_progress, force=force)
        else:
            _export(checkpoint, stage, chosen, opening, on_progress, force=force)
        if opening is not None:
            on_progress("static prefix", 0, 1)
            written = open_bundle(stage, verify=False)
            add_prefix(written, tokenize_prefix(opening, Tokenizer.of_bundle(written)))
        size = open_bundle(stage, verify=False).bytes
        if chosen.max_bytes is not None and size > chosen.max_bytes:
            raise EdgelmError(f"the bundle has {size} bytes, --max-bytes allows {chosen.max_bytes}")
    return open_bundle(out)


def outline(checkpoint: str | Path, *, progress: ProgressCallback | None = None, **options: Any) -> ExportOutline:
    """Return what `export` with the same options would write, without writing it. Raises as `export` does."""
    chosen = _checked(options)
    if chosen.via == "optimum":
        raise EdgelmError("--dry-run does not go with --via optimum: the size is known only after optimum's export")
    model = _open(checkpoint, chosen)
    length = choose_context(chosen.context, model.decoder.context)
    if chosen.prefix is not None:
        model = with_static_prefix(model, read_prefix_text(chosen.prefix), length)
    on_progress = progress or ignore_progress
    return make_plan(model, chosen, length, _calibration(model, chosen, length, on_progress), on_progress)[1]


def _checked(given: Mapping[str, Any]) -> ExportOptions:
    quant = given.get("quant") or ("int5" if given.get("fast") else "int4")
    options = ExportOptions(**{**given, "quant": quant})
    if options.kv == "int8":
        check_ort_version(MIN_ONNXRUNTIME, "--kv int8")
    return options


def _open(checkpoint: str | Path, options: ExportOptions) -> SourceModel:
    model = open_source_model(checkpoint, options.adapter)
    if options.vocab is None or options.vocab_size is None:
        return model
    return prune_model(model, options.vocab, options.vocab_size)


def _export(
    checkpoint: str | Path,
    stage: Path,
    options: ExportOptions,
    opening: PrefixText | None,
    progress: ProgressCallback,
    *,
    force: bool,
) -> None:
    model = _open(checkpoint, options)
    length = choose_context(options.context, model.decoder.context)
    if opening is not None:
        model = with_static_prefix(model, opening, length)
    measured = _evaluation_text(
        model, options, length
    )  # before the long work, so that an unreadable text fails at once
    documents = _calibration(model, options, length, progress, stage)
    plan, outline = make_plan(model, options, length, documents, progress)
    manifest = write_bundle(
        stage,
        model,
        plan,
        options.quant,
        length,
        progress,
        total=outline.matrix_bytes,
        documents=documents,
        report=options.report,
    )
    if options.kv == "int8":
        text = (
            documents if options.chosen_calibration is not None else None
        )  # with a budget, documents may be the text of --verify
        manifest = quantize_kv_cache(stage, manifest, model, text, progress)
    manifest = write_manifest(stage, manifest)
    reference = CheckpointPredictor(model.weights, progress)
    if options.quant != "fp32":
        found = self_check(Bundle(stage, manifest), reference, model.tokenizer, progress)
        if not force:
            raise_if_broken(found)
        manifest = write_manifest(stage, replace(manifest, self_check=found))
    if measured is not None and options.verify is not None:
        agreement = measure_agreement(Bundle(stage, manifest), reference, measured.documents, progress)
        check_agreement(agreement, options.max_kl, options.min_agreement)
        found = quality_facts(agreement, Path(options.verify).name, measured.left_out_tokens)
        write_manifest(stage, replace(manifest, quality=found))


def _calibration(
    model: SourceModel, options: ExportOptions, context: int, progress: ProgressCallback, beside: Path | None = None
) -> Sequence[Document] | None:
    """Return the documents for calibration and sensitivity; None if neither is needed."""
    chosen = options.chosen_calibration
    if not options.has_budget and chosen is None:
        return None
    if chosen == SELF_GENERATED:
        return sample_calibration_documents(model, context, progress, beside)
    file, flag = (chosen, "--calibrate") if chosen is not None else (options.verify, "--verify")
    if file is None:
        raise AssertionError("a budget without text")
    limit = calibration_token_count(model.decoder.parameters)
    return calibration_documents(read_text(file, flag), model.tokenizer, model.bos_token, context, limit, flag)


def _evaluation_text(model: SourceModel, options: ExportOptions, context: int) -> EvaluationText | None:
    if options.verify is None:
        return None
    return evaluation_documents(read_text(options.verify, "--verify"), model.tokenizer, model.bos_token, context)
