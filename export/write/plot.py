"""A plot of an export: the error and size of each matrix, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelm.bundle.manifest import Matrix

from ..architectures.weights import LAYER_PARTS

COLOURS = {"qkv": "#4477aa", "output": "#ee6677", "gate_up": "#228833", "down": "#ccbb44"}
"""Paul Tol's "bright" scheme, distinguishable with colour blindness."""
TABLE_COLOUR = "#555555"


def plot_report(file: Path, matrices: Sequence[Matrix], errors: Mapping[str, float]) -> None:
    """Plot relative error (lines) and size (stacked bars) of every layer. The same input gives the same bytes.

    `errors` are relative root mean square errors of the weights, by matrix name.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    places = _places(matrices)
    with mpl.rc_context({"svg.hashsalt": "edgelm", "font.size": 9}):
        figure = Figure(figsize=(max(6.0, 0.28 * len(places) + 3), 4.2), layout="constrained")
        sizes = figure.subplots()
        lost = sizes.twinx()
        _draw_sizes(sizes, matrices, places)
        _draw_errors(lost, matrices, places, errors)
        sizes.set_xticks(range(len(places)), list(places), rotation=90 if len(places) > 12 else 0)
        sizes.set_xlabel("layer")
        sizes.set_ylabel("size in MB (bars)")
        lost.set_ylabel("relative error of the weights in % (points)")
        lost.set_ylim(bottom=0)
        handles, labels = lost.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
        figure.savefig(file, format=file.suffix[1:], metadata={"Date": None})


def _places(matrices: Sequence[Matrix]) -> dict[str, int]:
    """Return the horizontal position of each layer: the embedding first, the head last."""
    labels = [matrix.name.split(".")[1] if "." in matrix.name else matrix.name for matrix in matrices]
    return {label: at for at, label in enumerate(dict.fromkeys(labels))}


def _place(matrix: Matrix, places: Mapping[str, int]) -> int:
    return places[matrix.name.split(".")[1] if "." in matrix.name else matrix.name]


def _part(matrix: Matrix) -> str:
    return matrix.name.rpartition(".")[2]


def _draw_sizes(axes: Any, matrices: Sequence[Matrix], places: Mapping[str, int]) -> None:
    bottoms = [0.0] * len(places)
    for matrix in matrices:
        at, size = _place(matrix, places), matrix.bytes() / 1e6
        axes.bar(at, size, bottom=bottoms[at], color=COLOURS.get(_part(matrix), TABLE_COLOUR), alpha=0.35, width=0.8)
        bottoms[at] += size


def _draw_errors(axes: Any, matrices: Sequence[Matrix], places: Mapping[str, int], errors: Mapping[str, float]) -> None:
    for part in LAYER_PARTS:
        named = [matrix for matrix in matrices if _part(matrix) == part]
        points = [(_place(matrix, places), 100 * errors[matrix.name]) for matrix in named]
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, linewidth=1, color=COLOURS[part], label=part)
    tables = [matrix for matrix in matrices if "." not in matrix.name]
    points = [(_place(matrix, places), 100 * errors[matrix.name]) for matrix in tables]
    axes.plot(*zip(*points, strict=True), "s", markersize=5, color=TABLE_COLOUR, label="embedding, head")
