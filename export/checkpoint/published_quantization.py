"""Reads checkpoints that were published quantized as float32, whole tensors or some of their rows.

Supported: FP8 (e4m3, with a scale per matrix, row or block), GPTQ with 2, 4 and 8 bits, AWQ with 4 bits in its `gemm`
layout. Other formats are refused; the error names the unquantized checkpoint if it can be guessed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgelm.errors import CheckpointError

from .checkpoint import CheckpointTensors
from .reading import read_json

Array = NDArray[np.float32]
Integers = NDArray[np.int32]
Codes = NDArray[np.uint8]

WEIGHT: Final = ".weight"
PACKED: Final = ".qweight"
SCALES: Final = (".weight_scale_inv", ".weight_scale")
"""Scales of a matrix of 8 bits. The first name says "inverse", but its values are multiplied like the second's."""

AUXILIARY_SUFFIXES: Final = (
    ".qzeros",
    ".scales",
    ".g_idx",
    *SCALES,
    ".input_scale",
    ".input_scale_ub",
    ".activation_scale",
    ".k_scale",
    ".v_scale",
)
"""Name suffixes of tensors that describe how to read others, or how activations were quantized."""

CONFIGS: Final = ("quantize_config.json", "quant_config.json")
"""Files in which early GPTQ and AWQ checkpoints store what is in config.json today."""

FLOAT8_VALUES: Final[Array] = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""The value of each byte (Micikevicius et al. 2022, arXiv:2209.05433, E4M3)."""

UNSUPPORTED_MARKERS: Final = {".quant_state.bitsandbytes__": "bitsandbytes", ".biases": "MLX"}
"""Parts of tensor names that identify a format which config.json may not name."""

AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's gemm layout: the column, of eight, in each 4 bits of a word, from the lowest bits up."""

QUANTIZED_NAME_SUFFIX: Final = re.compile(
    r"[-_.](gptq|awq|fp8|f8|bnb|bitsandbytes|unsloth|eetq|hqq|aqlm|quip\w*|marlin|exl[23]|spqr|vptq|higgs|quanto|torchao|"
    r"compressed|quantized|autoround|auto|round|dynamic|static|block|nf4|fp4|nvfp4|mxfp4|gemm|gemv|sym|asym|v[12]|"
    r"(?:int|w|q|u?int)?[2348]-?bits?|int[2348]|w\d+a\d+|g\d+|[2348]bpw)$",
    re.IGNORECASE,
)
"""Suffixes of the names of quantized checkpoints, after the name of the original."""


class RawTensors(CheckpointTensors, Protocol):
    """Tensors that can also be read with their stored dtype."""

    def layout(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return a tensor's type in safetensors' spelling, and its shape."""

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> NDArray[Any]:
        """Return a tensor with its stored dtype, or some of its rows and columns (step 1); 8-bit floats as uint8."""


class QuantizedLayout(Protocol):
    """The storage of one format's matrices."""

    def has_matrix(self, base: str) -> bool:
        """Return whether a matrix (name without `.weight`) is stored in this format."""

    def rows(self, base: str, shape: tuple[int, ...], rows: slice) -> Array:
        """Return rows [start, stop) of a matrix with this shape. Raises `CheckpointError`."""


def dequantize_tensors(
    stored: RawTensors, config: Mapping[str, Any], path: Path
) -> tuple[CheckpointTensors, str | None]:
    """Return the dequantized tensors of a checkpoint and a note for the user; float tensors unchanged and None.

    Raises `CheckpointError` for an unsupported format or an invalid quantization_config.
    """
    advice = _UnsupportedFormat(path, config)
    for name in stored.names:
        if any(sign in name for sign in UNSUPPORTED_MARKERS):
            raise advice.refusal(next(what for sign, what in UNSUPPORTED_MARKERS.items() if sign in name))
    settings = _settings(stored, config, path)
    if settings is None:
        return stored, None
    layout, what = _layout(stored, settings, advice)
    return DequantizedTensors(stored, layout), f"the weights were published quantized ({what}) and are dequantized"


@dataclass(frozen=True, slots=True)
class DequantizedTensors:
    """The tensors of a quantized checkpoint as floats. Unquantized matrices are read unchanged."""

    stored: RawTensors
    layout: QuantizedLayout

    @property
    def names(self) -> Collection[str]:
        """Every tensor's name; of quantized matrices the name of the weight."""
        kept = (name for name in self.stored.names if not name.endswith(AUXILIARY_SUFFIXES))
        return {name.removesuffix(PACKED) + WEIGHT if name.endswith(PACKED) else name for name in kept}

    def tensor(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> Array:
        """See `CheckpointTensors.tensor`."""
        base = name.removesuffix(WEIGHT)
        if not name.endswith(WEIGHT) or not self.layout.has_matrix(base):
            return self.stored.tensor(name, shape, rows)
        if len(shape) != 2:
            raise CheckpointError(f"{name} is stored quantized as a matrix, expected {list(shape)}")
        start, stop, _ = (slice(None) if rows is None else rows).indices(shape[0])
        values = self.layout.rows(base, shape, slice(start, max(start, stop)))
        if not np.isfinite(values).all():
            raise CheckpointError(f"{name} holds NaN or infinite values after dequantization")
        return values


@dataclass(frozen=True)
class Float8Layout:
    """Bytes e4m3 (or int8) times scales: one per matrix, one per row, or one per block of [block rows, block columns].

    The formats of transformers' `fp8` (`weight_scale_inv`, DeepSeek-V3's layout, arXiv:2412.19437, section 3.3) and
    `fbgemm_fp8`, and of compressed-tensors' `float-quantized` and `int-quantized`.
    """

    stored: RawTensors
    block: tuple[int, int] | None
    integers: bool = False

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.stored.names)

    def has_matrix(self, base: str) -> bool:
        """See `QuantizedLayout.has_matrix`."""
        if base + WEIGHT not in self._names:
            return False
        kind = self.stored.layout(base + WEIGHT)[0]
        return kind == "F8_E4M3" or (kind == "I8" and self.integers)

    def rows(self, base: str, shape: tuple[int, ...], rows: slice) -> Array:
        """See `QuantizedLayout.rows`."""
        name = base + WEIGHT
        kind, found = self.stored.layout(name)
        if found != shape:
            raise CheckpointError(f"{name} has shape {list(found)}, expected {list(shape)}")
        scales = self._scales(base, shape)
        codes = self.stored.read(name, rows)
        values: Array = FLOAT8_VALUES[codes] if kind == "F8_E4M3" else codes.astype(np.float32)
        if scales.shape[1] == 1 and scales.shape[0] in (1, shape[0]):
            values *= scales if scales.shape[0] == 1 else scales[rows]
            return values
        height, width = self.block or (1, 1)
        wide = np.repeat(scales, width, axis=1)[:, : shape[1]]
        values *= wide[np.arange(rows.start, rows.stop) // height]
        return values

    def _scales(self, base: str, shape: tuple[int, ...]) -> Array:
        """Return the scales as [1, 1], [rows, 1] or [row blocks, column blocks]."""
        name = next((base + end for end in SCALES if base + end in self._names), None)
        if name is None:
            raise CheckpointError(f"{base}{WEIGHT} is stored in 8 bits, but neither {' nor '.join(SCALES)[1:]} exists")
        found = self.stored.layout(name)[1]
        scales = self.stored.tensor(name, found)
        if scales.size == 1:
            return scales.reshape(1, 1)
        if found in ((shape[0],), (shape[0], 1)):
            return scales.reshape(-1, 1)
        if self.block is not None:
            expected = tuple(-(-size // step) for size, step in zip(shape, self.block, strict=True))
            if found == expected:
                return scales
        expected_text = "one, one for each row" + (f", or {list(expected)}" if self.block is not None else "")
        raise CheckpointError(f"{name} has shape {list(found)}; a matrix {list(shape)} has {expected_text}")


@dataclass(frozen=True)
class GptqLayout:
    """Words of 32 bits with 32 / bits rows of a transposed matrix each, the format of AutoGPTQ and GPTQModel.

    `qweight` int32 [K * bits / 32, N], lowest bits first; `scales` [groups, N]; `qzeros` int32 [groups, N * bits / 32],
    reduced by 1 in `checkpoint_format` "gptq" but not in "gptq_v2"; `g_idx` int [K], the group of each input. w[n, k] =
    scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n]).
    """

    stored: RawTensors
    bits: int
    group_size: int
    zero_offset: int

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.stored.names)

    def has_matrix(self, base: str) -> bool:
        """See `QuantizedLayout.has_matrix`."""
        return base + PACKED in self._names

    def rows(self, base: str, shape: tuple[int, ...], rows: slice) -> Array:
        """See `QuantizedLayout.rows`."""
        outputs, inputs = shape
        each = 32 // self.bits
        size = inputs if self.group_size == -1 else self.group_size
        groups = -(-inputs // size)
        if inputs % each or outputs % each:
            raise CheckpointError(f"{base}{PACKED}: a matrix {list(shape)} cannot be split into words of {each} codes")
        words = _integers(self.stored, base + PACKED, (inputs // each, outputs), None, rows)
        zeros = _integers(self.stored, base + ".qzeros", (groups, outputs // each))
        codes = _unpack(words, self.bits).transpose(0, 2, 1).reshape(inputs, -1)
        zero = _unpack(zeros, self.bits).reshape(groups, outputs)[:, rows]
        zero = (zero + np.uint8(self.zero_offset)) & np.uint8((1 << self.bits) - 1)
        scales = self.stored.tensor(base + ".scales", (groups, outputs))[:, rows]
        index = self._index(base, inputs, size, groups)
        values: Array = codes.astype(np.float32)
        values -= zero[index]
        values *= scales[index]
        return np.ascontiguousarray(values.T)

    def _index(self, base: str, inputs: int, size: int, groups: int) -> NDArray[np.int64]:
        name = base + ".g_idx"
        if name not in self._names:
            return np.arange(inputs) // size
        kind, found = self.stored.layout(name)
        if kind not in ("I32", "I64") or found != (inputs,):
            raise CheckpointError(f"{name} is {kind} {list(found)}; expected I32 [{inputs}]")
        index = self.stored.read(name).astype(np.int64)
        if index.min() < 0 or index.max() >= groups:
            raise CheckpointError(
                f"{name} refers to group {index.max() if index.max() >= groups else index.min()}, of {groups}"
            )
        return index


@dataclass(frozen=True)
class AwqLayout:
    """Words of 32 bits with eight interleaved columns of a transposed matrix each, AutoAWQ's format `gemm`.

    `qweight` int32 [K, N / 8], `qzeros` int32 [K / group, N / 8], `scales` [K / group, N]: w[n, k] = scales[k // group,
    n] * (code[k, n] - zero[k // group, n]) (Lin et al. 2023, arXiv:2306.00978).
    """

    stored: RawTensors
    group_size: int

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.stored.names)

    def has_matrix(self, base: str) -> bool:
        """See `QuantizedLayout.has_matrix`."""
        return base + PACKED in self._names

    def rows(self, base: str, shape: tuple[int, ...], rows: slice) -> Array:
        """See `QuantizedLayout.rows`."""
        outputs, inputs = shape
        size = inputs if self.group_size == -1 else self.group_size
        if outputs % 8 or inputs % size:
            raise CheckpointError(
                f"{base}{PACKED}: a matrix {list(shape)} cannot be split into words of 8 codes in groups of {size}"
            )
        words = slice(rows.start // 8, -(-rows.stop // 8))
        inside = slice(rows.start - 8 * words.start, rows.stop - 8 * words.start)
        codes = self._codes(base + PACKED, (inputs, outputs // 8), words)[:, inside]
        zeros = self._codes(base + ".qzeros", (inputs // size, outputs // 8), words)[:, inside]
        scales = self.stored.tensor(base + ".scales", (inputs // size, outputs))[:, rows]
        values: Array = codes.astype(np.float32).reshape(inputs // size, size, codes.shape[1])
        values -= zeros[:, None, :]
        values *= scales[:, None, :]
        return np.ascontiguousarray(values.reshape(inputs, codes.shape[1]).T)

    def _codes(self, name: str, shape: tuple[int, ...], words: slice) -> Codes:
        packed = _unpack(_integers(self.stored, name, shape, None, words), 4)
        ordered = np.empty_like(packed)
        ordered[..., AWQ_ORDER] = packed
        return ordered.reshape(shape[0], -1)


def _integers(
    stored: RawTensors, name: str, shape: tuple[int, ...], rows: slice | None = None, columns: slice | None = None
) -> Integers:
    """Return an int32 tensor with a known shape, or some of its rows and columns."""
    kind, found = stored.layout(name)
    if kind != "I32" or found != shape:
        raise CheckpointError(f"{name} is {kind} {list(found)}; expected I32 {list(shape)}")
    return stored.read(name, rows, columns)


def _unpack(words: Integers, bits: int) -> Codes:
    """Return the codes of each word, lowest bits first: [..., 32 / bits]."""
    codes = np.empty((*words.shape, 32 // bits), np.uint8)
    for i in range(32 // bits):
        codes[..., i] = (words >> (i * bits)) & ((1 << bits) - 1)  # the mask removes the sign extension
    return codes


# --- finding the format ---


def _settings(stored: RawTensors, config: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    """Return the checkpoint's quantization settings; None if it has none."""
    text = config.get("text_config")
    holders = [config, *([text] if isinstance(text, Mapping) else [])]
    for holder in holders:
        for key in ("quantization_config", "compression_config"):
            given = holder.get(key)
            if given is not None and not isinstance(given, Mapping):
                raise CheckpointError(
                    f"{path / 'config.json'}: {key} must be an object or null, got {str(given)[:80]!r}"
                )
            if given:
                return given
    if any(name.endswith(PACKED) for name in stored.names):
        for file in CONFIGS:
            beside = read_json(path / file, optional=True)
            if beside:
                return {"quant_method": "awq" if "w_bit" in beside else "gptq", **beside}
        raise CheckpointError(f"{path} has packed weights (*.qweight) but no quantization_config in config.json")
    if any(name.endswith(SCALES) for name in stored.names):
        return {"quant_method": "fp8"}
    return None


def _layout(stored: RawTensors, settings: Mapping[str, Any], advice: _UnsupportedFormat) -> tuple[QuantizedLayout, str]:
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method == "gptq":
        return _gptq(stored, settings, advice)
    if method == "awq":
        return _awq(stored, settings, advice)
    if method in ("fp8", "fbgemm_fp8"):
        return Float8Layout(stored, _block(settings)), "FP8"
    if method in ("compressed-tensors", "compressed_tensors"):
        return _compressed(stored, settings, advice)
    raise advice.refusal(f"quant_method {method!r}" if method is not None else "no quant_method")


def _gptq(stored: RawTensors, settings: Mapping[str, Any], advice: _UnsupportedFormat) -> tuple[QuantizedLayout, str]:
    bits, form = settings.get("bits"), settings.get("checkpoint_format") or "gptq"
    if settings.get("is_marlin_format"):
        form = "marlin"
    if bits not in (2, 4, 8) or isinstance(bits, bool):
        raise advice.refusal(f"GPTQ with bits {bits!r} (supported: 2, 4 and 8)")
    if form not in ("gptq", "gptq_v2"):
        raise advice.refusal(f"GPTQ in the checkpoint_format {form!r} (supported: 'gptq' and 'gptq_v2')")
    return GptqLayout(stored, bits, _group_size(settings), 1 if form == "gptq" else 0), f"GPTQ, {bits} bits"


def _awq(stored: RawTensors, settings: Mapping[str, Any], advice: _UnsupportedFormat) -> tuple[QuantizedLayout, str]:
    bits = settings.get("bits", settings.get("w_bit"))
    version = str(settings.get("version") or "gemm").lower()
    if bits != 4 or isinstance(bits, bool):
        raise advice.refusal(f"AWQ with bits {bits!r} (supported: 4)")
    if version not in ("gemm", "ipex"):
        raise advice.refusal(f"AWQ of version {version!r} (supported: 'gemm')")
    return AwqLayout(stored, _group_size(settings)), "AWQ, 4 bits"


def _compressed(
    stored: RawTensors, settings: Mapping[str, Any], advice: _UnsupportedFormat
) -> tuple[QuantizedLayout, str]:
    """Compressed-tensors: scaled bytes without zero points, in any of their formats."""
    form = settings.get("format")
    if form not in ("float-quantized", "int-quantized", "naive-quantized"):
        raise advice.refusal(
            f"compressed-tensors of the format {form!r} (supported: 'float-quantized' and 'int-quantized')"
        )
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise advice.refusal(f"compressed-tensors with the sparsity {sparsity.get('format')!r:.80}")
    if any(name.endswith(".weight_zero_point") for name in stored.names):
        raise advice.refusal("compressed-tensors with zero points")
    groups = settings.get("config_groups")
    given = (
        [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )
    blocks = {_block({"weight_block_size": args.get("block_structure")}) for args in given if isinstance(args, Mapping)}
    block = next((found for found in blocks if found is not None), None)
    return Float8Layout(stored, block, integers=True), "FP8" if form == "float-quantized" else "8 bits"


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    value = settings.get("weight_block_size")
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value)
    ):
        raise CheckpointError(
            f"config.json: quantization_config: weight_block_size must be two sizes, got {value!r:.80}"
        )
    return value[0], value[1]


def _group_size(settings: Mapping[str, Any]) -> int:
    value = settings.get("group_size", settings.get("q_group_size", 128))
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise CheckpointError(
            f"config.json: quantization_config: group_size must be a positive integer or -1, got {value!r:.80}"
        )
    return value


@dataclass(frozen=True, slots=True)
class _UnsupportedFormat:
    """Builds the error for an unsupported format."""

    path: Path
    config: Mapping[str, Any]

    def refusal(self, what: str) -> CheckpointError:
        sibling = guess_unquantized_name(self.path, self.config)
        named = "" if sibling is None else f", perhaps {sibling}"
        return CheckpointError(
            f"{self.path} is already quantized in an unsupported format (quantization_config: {what}): export the"
            f" unquantized checkpoint that it was made from{named}"
        )


def guess_unquantized_name(path: Path, config: Mapping[str, Any]) -> str | None:
    """Return the probable name of the checkpoint that a quantized one was made from, or None."""
    folder = next((part for part in path.parts if part.startswith("models--")), path.name)  # the hub's cache
    found = folder.removeprefix("models--").replace("--", "/")
    given = config.get("_name_or_path")
    for name in (found, given if isinstance(given, str) else ""):
        bare = name
        while (shorter := QUANTIZED_NAME_SUFFIX.sub("", bare)) != bare:
            bare = shorter
        if bare != name and bare:
            return bare
    return given if isinstance(given, str) and "/" in given and not given.startswith(("/", ".")) else None
