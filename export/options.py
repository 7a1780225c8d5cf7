"""The options of an export, checked before any work."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from edgelm.bundle.manifest import MAX_SIZE
from edgelm.errors import EdgelmError
from edgelm.system.installation import missing_extra
from edgelm.validation import FieldError, Range, check

from .quantize.matrix_plan import (
    BITS,
    BLOCK_SIZES,
    DEFAULT_BLOCK_SIZE,
    EMBEDDING_BITS,
    PARTS_WITH_LARGE_BLOCKS,
    QUANTIZED_BITS,
    TOKEN_MATRICES,
    Quant,
    QuantPlan,
    with_bits,
)
from .quantize.methods import method_names, needs_calibration
from .quantize.spec import QuantSpec

SELF_GENERATED: Final = "self"
"""Value of `--calibrate` for self-generated text instead of a file."""

DEFAULT_CONTEXT: Final = 4096
"""Default maximum context. A longer one takes more memory for every request, and more bytes for rotary tables."""

UNIFORM: Final = ("fp32", "int8", "keep")
"""Precisions that all matrices have, embedding and head too. Not calibrated by default."""

CALIBRATED_METHOD: Final = "gptq"
FAST_METHOD: Final = "clip"
INT8_METHOD: Final = "rtn"
"""The methods of `auto`: with calibration text, without, and for int8."""

Via = Literal["native", "optimum"]
Kv = Literal["fp32", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """See `edgelm_export.export`. Raises `EdgelmError` for a value out of range or a contradiction."""

    quant: Quant = "int4"
    block_size: int | None = None
    symmetric: bool = True
    method: str = "auto"
    calibrate: str | Path | None = None
    fast: bool = False
    embedding_bits: int | None = None
    context: int | None = None
    adapter: str | Path | None = None
    vocab: str | Path | None = None
    vocab_size: int | None = None
    verify: str | Path | None = None
    max_kl: Annotated[float, Range(0, math.inf, open_low=True)] | None = None
    min_agreement: Annotated[float, Range(0, 1.0, open_low=True)] | None = None
    max_bytes: Annotated[int, Range(1, MAX_SIZE)] | None = None
    report: bool = False
    prefix: str | Path | None = None
    kv: Kv = "fp32"
    via: Via = "native"

    def __post_init__(self) -> None:
        self._check_values()
        self._check_combinations()
        if self.quant == "keep":
            self._check_keep()
        if self.via == "optimum":
            self._check_optimum()
        if self.report and importlib.util.find_spec("matplotlib") is None:
            raise missing_extra("edgelm export --report", "report", "matplotlib")

    @property
    def plan(self) -> QuantPlan:
        """The plan before a budget changes it."""
        if self.quant == "fp32":
            return QuantPlan(None)
        block_size = DEFAULT_BLOCK_SIZE if self.block_size is None else self.block_size
        default = QuantSpec(BITS[self.quant], block_size, self.symmetric, self.chosen_method)
        if self.quant in UNIFORM or self.via == "optimum":
            return QuantPlan(default)
        bits = EMBEDDING_BITS[self.quant] if self.embedding_bits is None else self.embedding_bits
        exceptions = dict.fromkeys(TOKEN_MATRICES, with_bits(default, bits))
        if self.block_size is None:
            large = [*(TOKEN_MATRICES if bits == 5 else ()), *(PARTS_WITH_LARGE_BLOCKS if self.quant == "int5" else ())]
            exceptions.update({part: replace(exceptions.get(part, default), block_size=64) for part in large})
        return QuantPlan(with_bits(default, default.bits), exceptions)

    @property
    def chosen_method(self) -> str:
        """The method, `auto` resolved."""
        if self.method != "auto":
            return self.method
        if self.quant in ("int8", "keep"):
            return INT8_METHOD
        return FAST_METHOD if self.chosen_calibration is None else CALIBRATED_METHOD

    @property
    def chosen_calibration(self) -> str | Path | None:
        """The calibration text: a file, `SELF_GENERATED`, or None."""
        by_default = self.method == "auto" and self.quant not in UNIFORM
        calibrates = self.via == "native" and self.quant != "fp32" and (by_default or self._method_calibrates)
        if self.calibrate is not None or self.fast or not calibrates:
            return self.calibrate
        return SELF_GENERATED

    @property
    def has_budget(self) -> bool:
        """Whether the storage of each matrix is chosen by its sensitivity."""
        if self.via == "optimum" or self.quant == "keep":
            return False
        return self.quant == "mixed" or self.max_bytes is not None or (self.max_kl is not None and self.quant != "int8")

    @property
    def _method_calibrates(self) -> bool:
        """Whether the given method, not `auto`, needs calibration text."""
        return self.method != "auto" and needs_calibration(self.method)

    def _check_values(self) -> None:
        try:
            check(self)
        except FieldError as error:
            raise EdgelmError(str(error)) from error
        for name, value, allowed in (
            ("method", self.method, ("auto", *method_names())),
            ("embedding_bits", self.embedding_bits, (None, *QUANTIZED_BITS)),
            ("block_size", self.block_size, (None, *BLOCK_SIZES)),
        ):
            if value not in allowed:
                listed = ", ".join(str(each) for each in allowed if each is not None)
                raise EdgelmError(f"{name} must be one of {listed}, got {value!r}")

    def _check_combinations(self) -> None:
        if (self.vocab is None) != (self.vocab_size is None):
            raise EdgelmError("--vocab FILE (text of the domain) and --vocab-size N (tokens to keep) need each other")
        if self.fast and (self.calibrate is not None or self._method_calibrates):
            given = f"--method {self.method}" if self.calibrate is None else "--calibrate"
            raise EdgelmError(f"--fast does not go with {given}: it quantizes without calibration")
        if self.embedding_bits is not None and (self.quant in UNIFORM or self.via == "optimum"):
            with_what = "--via optimum" if self.via == "optimum" else f"--quant {self.quant}"
            raise EdgelmError(
                f"--embedding-bits does not go with {with_what}, which has one precision for all matrices"
            )
        if (self.max_kl is not None or self.min_agreement is not None) and self.verify is None:
            raise EdgelmError("--max-kl and --min-agreement need --verify FILE: the text to measure on")
        if self.has_budget and self.chosen_calibration is None and self.verify is None:
            raise EdgelmError(
                "choosing the precision of each matrix needs text for measuring: --calibrate FILE (or --verify FILE)"
            )
        if self.max_bytes is not None and self.quant == "fp32":
            raise EdgelmError("--max-bytes does not go with --quant fp32: every matrix is float32")
        unused = self.quant == "fp32" or (not self.has_budget and not needs_calibration(self.chosen_method))
        if self.calibrate is not None and unused and self.kv == "fp32":
            raise EdgelmError(f"--calibrate has no effect with --quant {self.quant} and --method {self.chosen_method}")

    def _check_keep(self) -> None:
        given = {
            "--block-size": self.block_size is not None,
            "--asymmetric": not self.symmetric,
            "--method": self.method != "auto",
            "--adapter": self.adapter is not None,
            "--via optimum": self.via == "optimum",
        }
        wrong = next((name for name, is_given in given.items() if is_given), None)
        if wrong is not None:
            raise EdgelmError(f"{wrong} does not go with --quant keep, which copies the blocks of the file")

    def _check_optimum(self) -> None:
        given: dict[str, Any] = {
            "--calibrate": self.calibrate,
            "--fast": self.fast or None,
            "--adapter": self.adapter,
            "--vocab": self.vocab,
            "--max-bytes": self.max_bytes,
            f"--quant {self.quant}": self.quant in ("int5", "int6", "mixed") or None,
            "--report": self.report or None,
            "--kv int8": self.kv == "int8" or None,
        }
        wrong = next((name for name, value in given.items() if value is not None), None)
        if wrong is not None:
            raise EdgelmError(f"{wrong} does not go with --via optimum: only the native builder has it")


def choose_context(wanted: int | None, limit: int) -> int:
    """Return the bundle's context: `wanted`, or by default `limit` but at most `DEFAULT_CONTEXT`.

    limit: the checkpoint's own. Raises `EdgelmError` if `wanted` is out of range.
    """
    if wanted is None:
        return min(limit, DEFAULT_CONTEXT)
    if not 1 <= wanted <= limit:
        raise EdgelmError(f"context must lie in [1, {limit}], the checkpoint's own limit; got {wanted}")
    return wanted
