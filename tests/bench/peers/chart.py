"""A report as a bar chart: how many times as fast edgelm is beside each peer, shape by shape."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.bench.peers.results import COLUMNS, judge_side, ratios
from tests.bench.peers.shapes import NAMES
from tests.bench.peers.sides import PEERS

PANELS: Final = {"decode 256": "decode after 256 tokens", "prefill 256": "prefill of 256 tokens"}
COLORS: Final = ("#4477aa", "#ee6677", "#228833", "#ccbb44")


def draw(report: dict[str, Any], wanted: str | None, out: Path) -> None:
    """Write the chart as a PNG; whiskers reach from the least to the most of the rounds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    shapes = {name: shape for name, shape in report["shapes"].items() if judge_side(shape, wanted)}
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 4.6), sharey=True, layout="constrained")
    found = {
        (name, peer.name, column): ratios(shape, judge_side(shape, wanted) or "", peer.name, COLUMNS[column])
        for name, shape in shapes.items()
        for peer in PEERS
        for column in PANELS
    }
    peers = [each.name for each in PEERS if any(found[n, each.name, c] for n in shapes for c in PANELS)]
    height = 0.8 / max(1, len(shapes))
    for axis, (column, title) in zip(axes, PANELS.items(), strict=True):
        for i, name in enumerate(shapes):
            rows = [(at, found[name, peer, column]) for at, peer in enumerate(peers) if found[name, peer, column]]
            if not rows:
                continue
            at = np.array([row for row, _ in rows]) + (i - (len(shapes) - 1) / 2) * height
            middle = np.array([statistics.median(values) for _, values in rows])
            ends = np.array([[min(values), max(values)] for _, values in rows]).T
            # Bars begin at 1, where both are level.
            label = f"{NAMES.get(name, name)}: {judge_side(shapes[name], wanted)}"
            axis.barh(at, middle - 1, height * 0.92, left=1, color=COLORS[i % len(COLORS)], label=label)
            axis.errorbar(middle, at, xerr=np.abs(ends - middle), fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
            for y, value, most in zip(at, middle, np.maximum(ends[1], 1), strict=True):
                axis.text(most * 1.04, y, f"{value:.2f}", va="center", fontsize=7)
        axis.set_xscale("log")
        axis.axvline(1, color="#222222", linewidth=1)
        axis.set_yticks(range(len(peers)), peers)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("times as fast as the peer (log scale)")
        axis.xaxis.set_major_locator(mpl.ticker.FixedLocator([0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50]))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.12)
        axis.grid(axis="x", linewidth=0.4)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    drawn = {label: bar for axis in axes for bar, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if drawn:
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
