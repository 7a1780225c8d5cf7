"""Texts and tables that several commands print."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any, Final

from edgelm.bundle.bundle_folder import Bundle
from edgelm.bundle.manifest import Matrix
from edgelm.types import Completion

MAX_SHOWN_CHARACTERS: Final = 60
"""Printed length of a static prefix."""


def explain_truncation(done: Completion, context: int | None = None) -> str | None:
    """Return why an answer was cut and the flag that changes it; None if the model ended the answer.

    `context` is the limit for the tokens of prompt and answer; None if it is not known.
    """
    tokens, total = done.usage.completion_tokens, done.usage.prompt_tokens + done.usage.completion_tokens
    if done.finish_reason == "repetition":
        return "the answer was cut because it repeated itself (--no-repetition-guard disables this)"
    if done.finish_reason == "deadline":
        return f"the answer was cut after {tokens} tokens: the deadline passed"
    if done.finish_reason != "length":
        return None
    if context is None:
        return (
            f"the answer was cut after {tokens} tokens ({total} with the prompt): --max-tokens, or the context is full"
        )
    if total >= context:
        return f"the answer was cut after {tokens} tokens: the context of {context} is full"
    return f"the answer was cut after {tokens} tokens (--max-tokens)"


def speed_text(done: Completion) -> str:
    """Return the token counts and the speed of an answer, in one line."""
    usage, timing = done.usage, done.timing
    return (
        f"{usage.completion_tokens} tokens, {timing.tok_s:.1f} tok/s; prompt {usage.prompt_tokens} tokens,"
        f" {usage.cached_tokens} of them cached; first token after {timing.ttft_ms:.0f} ms,"
        f" {timing.total_ms / 1e3:.1f} s in total"
    )


def quality_table(quality: Mapping[str, Any]) -> str:
    """Return a table of the manifest's `quality`: the bundle compared with its checkpoint."""
    change = 100 * (quality["perplexity"] / quality["reference_perplexity"] - 1)
    rows = [
        (f"on {quality['text']}", "checkpoint", "bundle", ""),
        ("perplexity", f"{quality['reference_perplexity']:.4f}", f"{quality['perplexity']:.4f}", f"{change:+.2f} %"),
        ("KL divergence, mean", "", f"{quality['kl_mean']:.4f}", "nats"),
        ("KL divergence, p99", "", f"{quality['kl_p99']:.4f}", "nats"),
        ("same top token", "", f"{100 * quality['top1_agreement']:.2f} %", f"of {quality['tokens']} positions"),
    ]
    lines = [f"{a:<22} {b:>10} {c:>10}  {d}".rstrip() for a, b, c, d in rows]
    if quality.get("left_out_tokens"):
        lines.append(f"measured on evenly spaced parts of the text: {quality['left_out_tokens']} tokens were left out")
    return "\n".join(lines)


def self_check_text(found: Mapping[str, Any]) -> str:
    """Return the result of the export's self-check, in one line."""
    change = 100 * (found["perplexity"] / found["reference_perplexity"] - 1)
    return (
        f"self-check on {found['tokens']} tokens of sample text: perplexity {found['reference_perplexity']:.4g} ->"
        f" {found['perplexity']:.4g} ({change:+.1f} %), KL {found['kl_mean']:.4f} nats"
    )


def prefix_text(bundle: Bundle) -> str | None:
    """Return a bundle's static prefix in one line; None if it has none."""
    prefix = bundle.manifest.prefix
    if prefix is None:
        return None
    from edgelm.text.tokenizer import Tokenizer

    text = " ".join(Tokenizer.of_bundle(bundle).decode(prefix.tokens).split())
    size = bundle.manifest.files[prefix.file].bytes
    shown = text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."
    return f"{len(prefix.tokens)} tokens, {size / 1e6:.2f} MB: {shown!r}"


def outline_table(outline: Any) -> str:
    """Return the plan of each matrix; consecutive layers with the same plan share a line."""
    lines = [f"{'matrix':<26} {'shape':>15} {'bits':>5} {'block':>6} {'zeros':>6} {'method':>7} {'MB':>9}"]
    for _, group in groupby(_by_part(outline.matrices), key=lambda pair: (pair[0], _storage(pair[1]))):
        alike = [matrix for _, matrix in group]
        first = alike[0]
        name = first.name if len(alike) == 1 else f"{first.name} .. {alike[-1].name.split('.')[1]}"
        size = sum(matrix.bytes() for matrix in alike) / 1e6
        zeros = "" if first.block_size is None else "no" if first.symmetric else "yes"
        lines.append(
            f"{name:<26} {f'{first.rows} x {first.columns}':>15} {first.bits:>5} {first.block_size or '':>6}"
            f" {zeros:>6} {first.method or '':>7} {size:>9.2f}"
        )
    lines.append(
        f"{outline.bits_per_weight:.2f} bits per weight; about {outline.bytes / 1e6:.1f} MB with tokenizer and graph"
    )
    if outline.kl is not None:
        lines.append(f"KL divergence expected from sensitivities: {outline.kl:.4f} nats")
    return "\n".join(lines)


def _by_part(matrices: tuple[Matrix, ...]) -> list[tuple[str, Matrix]]:
    """Return pairs of part and matrix, grouped by part, in the order of the graph."""
    parts = {matrix.name: matrix.name.rpartition(".")[2] for matrix in matrices}
    order = list(dict.fromkeys(parts.values()))
    return sorted(((parts[matrix.name], matrix) for matrix in matrices), key=lambda pair: order.index(pair[0]))


def _storage(matrix: Matrix) -> tuple[object, ...]:
    return (matrix.bits, matrix.block_size, matrix.symmetric, matrix.method)
