"""A report as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any, Final

from tests.bench.peers.results import COLUMNS, Shape, figures, judge_side, ratios, spread, verdicts
from tests.bench.peers.shapes import NAMES

SPEEDS: Final = {
    **{f"prefill {n}": (f"prefill {n}, tok/s", 1.0, 0) for n in (32, 256, 1024)},
    **{f"decode {n}": (f"decode at {n}, tok/s", 1.0, 1) for n in (16, 256, 1024)},
    "share 256": ("share of bandwidth at 256, %", 100.0, 0),
    "warm_ms": ("first token of 210, 200 known, ms", 1.0, 1),
    "cold_ms": ("none known, ms", 1.0, 1),
    **{f"streams {n}": (f"{n} streams, tok/s", 1.0, 1) for n in (1, 2, 4, 8)},
}
"""Figure -> its heading, a factor, and its digits."""

COSTS: Final = {
    "load_s": ("load, ms", 1e3, 0),
    "ready_s": ("and first token, ms", 1e3, 0),
    "import_s": ("import, s", 1.0, 2),
    "private_mb": ("private MB", 1.0, 0),
    "mapped_mb": ("mapped MB", 1.0, 0),
    "peak_mb": ("peak MB", 1.0, 0),
}


def markdown(report: dict[str, Any], wanted: str | None) -> str:
    """Return all of a report's tables."""
    parts = [table for name, shape in report["shapes"].items() for table in shape_tables(name, shape, wanted)]
    judged = [each for name, shape in report["shapes"].items() for each in verdicts(name, shape, wanted)]
    if judged:
        rows = [
            [each.shape, each.what, each.wanted, each.found, "met" if each.met else "**missed**"] for each in judged
        ]
        parts.append("### Targets\n\n" + table(["shape", "what", "wanted", "median (least-most)", ""], rows))
    return "\n\n".join(parts)


def shape_tables(name: str, shape: Shape, wanted: str | None) -> list[str]:
    """Return the figures of one checkpoint, and edgelm's ratios."""
    settings, rounds = shape["settings"], shape["rounds"]
    bandwidth = spread([entry["bandwidth_gb_s"] for entry in rounds], 1)
    busy = max((entry["busy"] for entry in rounds), default=0.0)
    versions = ", ".join(f"{program} {version}" for program, version in shape["versions"].items())
    head = f"### {NAMES.get(name, name)}, {shape['parameters'] / 1e6:.1f} M parameters"
    said = (
        f"{shape['machine']}; {settings['threads']} threads; {len(rounds)} rounds, medians; memory bandwidth"
        f" {bandwidth} GB/s; others took at most {busy:.0%} of the processors;"
        f" {versions}. KL over {shape['judged_tokens']} tokens, beside transformers in float32."
    )
    sides = [*shape["ours"], *(side for side in shape["notes"] if side not in shape["ours"])]
    speeds = [[side, closeness(shape, side), *cells(shape, side, SPEEDS)] for side in sides]
    costs = [[side, *size(shape, side), *cells(shape, side, COSTS)] for side in sides]
    parts = [
        f"{head}\n\n{said}",
        table(["", "KL", *(label for label, _, _ in SPEEDS.values())], speeds),
        table(["", "size MB", "built in s", "peak MB", *(label for label, _, _ in COSTS.values())], costs),
    ]
    ours = judge_side(shape, wanted)
    if ours:
        rows = [
            [side, *(spread(ratios(shape, ours, side, column)) for column in COLUMNS.values())]
            for side in sides
            if side != ours and figures(shape, side, "load_s")
        ]
        if rows:
            title = f"**{ours} beside each**: times as fast; of load time and private memory, edgelm's through theirs."
            parts.append(f"{title}\n\n" + table(["", *(column.label for column in COLUMNS.values())], rows))
    notes = list(remarks(shape))
    return [*parts, "\n".join(f"- {note}" for note in notes)] if notes else parts


def closeness(shape: Shape, side: str) -> str:
    """Return a side's KL."""
    found = shape["closeness"].get(side)
    return f"{found['kl_mean']:.5f}" if found else "–"


def size(shape: Shape, side: str) -> list[str]:
    """Return a side's size, and what building it took."""
    built = shape["built"].get(side, {})
    wanted = (("size_mb", 1), ("wall_s", 1), ("peak_mb", 0))
    return [f"{built[key]:.{digits}f}" if key in built else "–" for key, digits in wanted]


def cells(shape: Shape, side: str, columns: dict[str, tuple[str, float, int]]) -> list[str]:
    """Return medians."""
    found = []
    for key, (_, factor, digits) in columns.items():
        values = figures(shape, side, key)
        found.append(f"{factor * statistics.median(values):.{digits}f}" if values else "–")
    return found


def remarks(shape: Shape) -> Iterable[str]:
    """Yield what each side is, and why figures are missing."""
    for side, note in shape["notes"].items():
        if note:
            yield f"{side}: {note}."
        if side in shape["no_reuse"] and side not in shape["left_out"]:
            yield f"{side}: knows no earlier prompt, so that all 210 tokens are computed."
        if side in shape["left_out"]:
            yield f"{side}: {shape['left_out'][side]}."
        for measure, why in shape["failed"].get(side, {}).items():
            yield f"{side}, {measure}: {why}"
    for measure in shape["too_long"]:
        yield f"{measure}: does not fit the model's context of {shape['context']}."


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table whose first column is text."""
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
