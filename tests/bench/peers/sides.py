"""Who is measured: edgelm's forms and the peers', each as it is built and as it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Side:
    """One row of the table.

    `form` says what is built: edgelm's export flags, a format of llama.cpp; sides with the same `built` share it. A
    slow side is measured with fewer tokens and repeats. `shapes` are those measured unless a side is asked for by name,
    and `left_out` says why.
    """

    name: str
    program: str
    built: str
    form: str = ""
    job: dict[str, Any] = field(default_factory=dict)
    cache_bytes: int = 4
    slow: bool = False
    shapes: tuple[str, ...] = ("stories", "135m", "0.5b", "1b")
    note: str = ""
    left_out: str = ""

    @property
    def script(self) -> str:
        """The script that measures it."""
        return f"measure_{'torch' if self.program in ('optimum', 'transformers') else self.program}.py"


EDGELM: Final = {
    "edgelm-int4": "--quant int4",
    "edgelm-int8": "--quant int8",
}
"""edgelm's sides and their export flags."""

JUDGES: Final = ("edgelm-int4", "edgelm-int8")
"""Which of edgelm's sides the targets are judged with: the first that was measured."""

_SMALL: Final = ("stories", "135m", "0.5b")
_TOO_LARGE: Final = "left out unless asked for by name: it takes minutes a round and many GB"
_TOO_LONG: Final = "left out unless asked for by name: calibrating takes about an hour"

PEERS: Final = (
    *(
        Side(f"llama-{form.lower()}", "llama_cpp", f"{form}.gguf", form, cache_bytes=2)
        for form in ("Q4_0", "Q4_K_M", "Q8_0")
    ),
    Side("genai", "genai", "genai", job={"threads": 0}, note="as it comes: it chooses its threads"),
    Side("genai-threads", "genai", "genai", note="with as many threads as the others"),
    Side("optimum", "optimum", "optimum", job={"kind": "optimum"}, slow=True, shapes=_SMALL, left_out=_TOO_LARGE),
    Side(
        "transformers",
        "transformers",
        "checkpoint",
        job={"kind": "transformers", "dtype": "float32"},
        slow=True,
        shapes=_SMALL,
        note="float32",
        left_out=_TOO_LARGE,
    ),
    Side(
        "transformers-bf16",
        "transformers",
        "checkpoint",
        job={"kind": "transformers", "dtype": "bfloat16"},
        cache_bytes=2,
        slow=True,
        shapes=_SMALL,
        note="bfloat16",
        left_out=_TOO_LARGE,
    ),
)


def all_sides(edgelm: dict[str, str]) -> dict[str, Side]:
    """Return every side by name: edgelm's, of these names and export flags, then the peers."""
    plain = {name: Side(name, "edgelm", name, flags, note=flags) for name, flags in edgelm.items()}
    ours = [
        replace(side, shapes=_SMALL, left_out=_TOO_LONG) if "--calibrate" in side.form else side
        for side in plain.values()
    ]
    return {side.name: side for side in (*ours, *PEERS)}
