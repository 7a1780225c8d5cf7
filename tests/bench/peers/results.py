"""What the rounds amount to: medians, ratios of the same round, and the targets."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Final

from tests.bench.peers.shapes import STORIES
from tests.bench.peers.sides import JUDGES

Shape = dict[str, Any]
"""A report's entry of one checkpoint: see `__main__.measure_shape`."""


@dataclass(frozen=True, slots=True)
class Column:
    """A ratio: edgelm's figure through the peer's, or, of times that are to be short, the peer's through edgelm's."""

    label: str
    ours: str
    theirs: str
    inverse: bool = False


COLUMNS: Final = {
    **{f"prefill {n}": Column(f"prefill {n}", f"prefill {n}", f"prefill {n}") for n in (32, 256, 1024)},
    **{f"decode {n}": Column(f"decode at {n}", f"decode {n}", f"decode {n}") for n in (16, 256, 1024)},
    "first": Column("first token, 200 of 210 known", "warm_ms", "warm_ms", inverse=True),
    "first-all": Column("first token, 200 known to edgelm alone", "warm_ms", "cold_ms", inverse=True),
    **{f"streams {n}": Column(f"{n} streams", f"streams {n}", f"streams {n}") for n in (1, 2, 4, 8)},
    "load": Column("load time", "load_s", "load_s"),
    "private": Column("private memory", "private_mb", "private_mb"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A bound of the median ratio beside a peer, set for some shapes or for all but stories260K."""

    peer: str
    column: str
    bound: float
    at_least: bool = True
    shapes: tuple[str, ...] = ()


_PLAIN: Final = ("optimum", "transformers", "transformers-bf16")
_GENAI: Final = ("genai", "genai-threads")

TARGETS: Final = (
    Target("llama-q4_0", "decode 256", 1.25, shapes=("0.5b",)),
    Target("llama-q4_0", "decode 256", 1.3, shapes=("135m",)),
    Target("llama-q4_0", "decode 1024", 1.0),
    Target("llama-q4_0", "prefill 256", 1.3),
    Target("llama-q4_0", "private", 0.5, at_least=False),
    Target("llama-q4_0", "load", 0.7, at_least=False),
    Target("llama-q4_0", "streams 8", 1.2),
    *(Target(peer, "decode 256", 1.6) for peer in _GENAI),
    *(Target(peer, "prefill 256", 2.5) for peer in _GENAI),
    *(Target(peer, column, 10.0) for peer in _GENAI for column in ("first-all", "first")),
    *(Target(peer, "decode 256", 5.0) for peer in _PLAIN),
    *(Target(peer, "prefill 256", 2.0) for peer in _PLAIN),
)

SHARE: Final = ("0.5b", "share 256", 0.65)
"""The shape whose decode is to take this share of the measured bandwidth."""

SAME_QUALITY: Final = ("llama-q4_0", "genai")
"""Peers whose KL edgelm's is not to exceed: a form that is further from the model would be less work."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target and what was measured."""

    shape: str
    what: str
    wanted: str
    found: str
    met: bool


def figures(shape: Shape, side: str, key: str) -> list[float]:
    """Return a side's figure of every round that has it."""
    rounds = [entry["sides"].get(side, {}) for entry in shape["rounds"]]
    return [found[key] for found in rounds if key in found]


def ratios(shape: Shape, ours: str, peer: str, column: Column) -> list[float]:
    """Return a ratio of every round in which both were measured."""
    found = []
    for entry in shape["rounds"]:
        own, other = entry["sides"].get(ours, {}).get(column.ours), entry["sides"].get(peer, {}).get(column.theirs)
        if own and other:
            found.append(other / own if column.inverse else own / other)
    return found


def spread(values: list[float], digits: int = 2) -> str:
    """Return "median (least-most)", or a dash."""
    if not values:
        return "–"
    low, mid, high = min(values), statistics.median(values), max(values)
    return f"{mid:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def judge_side(shape: Shape, wanted: str | None) -> str | None:
    """Return which of edgelm's sides is held to the targets: the one asked for, else the first of `JUDGES` measured."""
    measured = {side for entry in shape["rounds"] for side, found in entry["sides"].items() if found}
    ours = [name for name in shape["ours"] if name in measured]
    if wanted:
        return wanted if wanted in ours else None
    return next((name for name in (*JUDGES, *ours) if name in ours), None)


def verdicts(name: str, shape: Shape, wanted: str | None) -> list[Verdict]:
    """Judge every target that this shape has figures for."""
    ours = judge_side(shape, wanted)
    if ours is None or name == STORIES:
        return []
    found = []
    for target in TARGETS:
        column = COLUMNS[target.column]
        values = ratios(shape, ours, target.peer, column)
        if values and (not target.shapes or name in target.shapes):
            mid = statistics.median(values)
            met = mid >= target.bound if target.at_least else mid <= target.bound
            wanted_ratio = f"{'at least' if target.at_least else 'at most'} {target.bound:g}"
            what = f"{ours} beside {target.peer}: {column.label}"
            found.append(Verdict(name, what, wanted_ratio, spread(values), met))
    shape_of_share, key, bound = SHARE
    shares = figures(shape, ours, key)
    if shares and name == shape_of_share:
        met = statistics.median(shares) >= bound
        what = f"{ours}: share of the memory bandwidth, decode at 256"
        found.append(Verdict(name, what, f"at least {bound:g}", spread(shares), met))
    closeness = shape["closeness"]
    for peer in SAME_QUALITY:
        if ours in closeness and peer in closeness:
            own, other = closeness[ours]["kl_mean"], closeness[peer]["kl_mean"]
            what = f"{ours} beside {peer}: KL from the checkpoint"
            found.append(Verdict(name, what, f"at most {other:.5f}", f"{own:.5f}", own <= other))
    return found
