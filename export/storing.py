"""Every matrix of a decoder into the data file, each as the plan says, one at a time."""

from __future__ import annotations

from collections.abc import Callable

from edgelm.bundle import Matrix

from .initializers import Initializers
from .matrices import store_float, store_packed
from .quantize.plan import Plan
from .rows import Rows
from .weights import Weights

Progress = Callable[[str, int, int], None]


def store_matrices(
    weights: Weights, plan: Plan, initializers: Initializers, progress: Progress
) -> dict[str, Matrix]:
    """Quantize and write all matrices; return how each is stored, by name, in the order of the graph."""
    total = 2 + 4 * len(weights.decoder.layers) - weights.decoder.tied
    stored = {}
    for number, (name, rows) in enumerate(weights.matrices()):
        progress("matrix", number, total)
        stored[name] = store(initializers, name, rows, plan)
    return stored


def store(initializers: Initializers, name: str, rows: Rows, plan: Plan) -> Matrix:
    """Write one matrix."""
    spec = plan.spec(name)
    if spec is None:
        return store_float(initializers, name, rows, table=name in ("embedding", "head"))
    from .quantize.quantizer import Quantizer
    return store_packed(initializers, name, Quantizer(spec).quantize(rows.whole()), spec)
