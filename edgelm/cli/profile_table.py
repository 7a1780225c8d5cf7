"""The tables of `edgelm bench --profile`: time by operator, by layer, and outside the nodes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

from edgelm.bench.profiler import Phase, ProfileReport
from edgelm.bench.trace import ModelPart, OperatorTotal, group_layers

MIN_SHARE: Final = 0.005
"""Operators below this share of the nodes' time are summed in one line."""
MIN_MILLISECOND_STEP_US: Final = 10_000.0
"""Steps of at least this duration are printed in milliseconds."""


def profile_table(profile: ProfileReport) -> str:
    """Return the whole profile as text."""
    head = (
        f"{profile.threads} threads, memory bandwidth {profile.memory_bandwidth_gb_s:.1f} GB/s (read, measured)\n"
        "times are medians over the steps, node by node; shares are of the nodes' time"
    )
    return "\n\n".join([head, *(_phase(phase) for phase in profile.phases)])


def _phase(phase: Phase) -> str:
    folded = phase.typical_step
    unit, scale = ("ms", 1e-3) if phase.step_us >= MIN_MILLISECOND_STEP_US else ("us", 1.0)
    places = 2 if unit == "ms" else 1
    what = (
        f"prefill of {phase.tokens} tokens, {phase.steps} passes"
        if phase.name == "prefill"
        else f"decode of {phase.batch} at {phase.context} tokens, {phase.steps} steps"
    )

    def line(name: str, us: float, rest: str = "") -> str:
        return f"  {name:<42} {scale * us:>9.{places}f} {rest}".rstrip()

    shown = [each for each in folded.operators if folded.share(each.us) >= MIN_SHARE]
    hidden = folded.operators[len(shown) :]
    lines = [f"{what:<44} {unit + ' a step':>9} {'share':>6} {'nodes':>6} {'us each':>9} {'GB/s':>6} {'GFLOP/s':>8}"]
    for each in shown:
        rates = f"{_rate(each.gb_s):>6} {_rate(each.gflop_s):>8}"
        numbers = f"{100 * folded.share(each.us):>5.1f}% {each.nodes:>6.4g} {each.us_each:>9.1f} {rates}"
        lines.append(line(_name(each), each.us, numbers))
    if hidden:
        us, nodes = sum(each.us for each in hidden), sum(each.nodes for each in hidden)
        numbers = f"{100 * folded.share(us):>5.1f}% {nodes:>6.4g} {us / nodes:>9.1f}"
        lines.append(line(f"{len(hidden)} more operators", us, numbers))
    nodes = sum(each.nodes for each in folded.operators)
    lines += [
        line("all nodes", folded.nodes_us, f"{100:>5}% {nodes:>6.4g}"),
        line("between the nodes", folded.between_us),
        line("outside the graph (Python)", phase.outside_us),
        line("the step, profiled", phase.step_us),
        line("the step, not profiled", phase.plain_us, f"{phase.step_us / phase.plain_us - 1:>+6.0%} by profiling"),
    ]
    if folded.parts is None:
        lines.append("no times by layer: the names of this bundle's nodes have no layer number")
        return "\n".join(lines)
    lines.append(f"{'by layer':<44} {unit + ' a step':>9} {'share':>6} {'nodes':>6}   each: least, median, most")
    for parts in group_layers(folded.parts):
        us, scaled = sum(part.us for part in parts), [scale * part.us for part in parts]
        nodes = sum(part.nodes for part in parts)
        numbers = f"{100 * folded.share(us):>5.1f}% {nodes:>6.4g}"
        if len(parts) > 1:
            numbers += f"   {min(scaled):.{places}f}, {median(scaled):.{places}f}, {max(scaled):.{places}f}"
        lines.append(line(_parts_name(parts), us, numbers))
    return "\n".join(lines)


def _name(operator: OperatorTotal) -> str:
    """Return an operator's name with its matrices: `MatMulNBits 576 x 3072, 4 bits`."""
    if operator.shape is None:
        return operator.operator
    bits = "" if operator.bits is None else f", {operator.bits} bits"
    return f"{operator.operator} {operator.shape[0]} x {operator.shape[1]}{bits}"


def _parts_name(parts: Sequence[ModelPart]) -> str:
    first = parts[0].name
    return first if len(parts) == 1 else f"layers {first.split()[1]} to {parts[-1].name.split()[1]}"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
