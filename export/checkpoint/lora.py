"""LoRA adapters in PEFT's format, added to the checkpoint's weights when they are read.

File and tensor names are those of PEFT 0.21; `lora_config` documents the arithmetic. Sums are computed in float32,
whatever the adapter's dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edgelm.errors import CheckpointError

from . import Safetensors, TensorSource, resolve_directory
from .lora_config import CONFIG, AdapterOptions, read_options
from .reading import check_file_content

Array = NDArray[np.float32]

WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
HEAD: Final = "lm_head.weight"
EMBEDDING: Final = "embed_tokens.weight"
FACTORS: Final = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "embedding A",
    "lora_embedding_B": "embedding B",
}


@dataclass(frozen=True, slots=True)
class LoraProduct:
    """scale * B @ A, or its transpose for an embedding. `a` and `b` are names of the adapter's tensors."""

    a: str
    b: str
    scale: float
    is_embedding: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """An opened adapter: the changes that it adds to tensors of the base, and the tensors that it replaces.

    Keys of `products` and `replacements` are the base's tensor names; `shapes` are those of the adapter's tensors.
    """

    weights: Safetensors
    products: Mapping[str, LoraProduct]
    replacements: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    is_tied: bool | None
    ties_embedding: bool

    @property
    def changed_tensors(self) -> list[str]:
        """The names of the base's tensors that the adapter changes, sorted."""
        return sorted({*self.products, *self.replacements})

    def check(self, names: Collection[str]) -> None:
        """Check that the adapter belongs to a base with tensors of these names.

        Raises `CheckpointError` if a changed tensor is missing, or if only one of embedding and head would change in a
        base that stores them as one matrix.
        """
        tied = HEAD not in names if self.is_tied is None else self.is_tied
        missing = [name for name in self.changed_tensors if name not in names and not (tied and name == HEAD)]
        if missing:
            raise CheckpointError(
                f"{self.weights.path} is an adapter for another base: it changes {missing[0]}, which the checkpoint"
                f" does not have ({len(missing)} of {len(self.changed_tensors)} tensors are missing)"
            )
        if tied:
            self._check_tied()

    def apply(self, name: str, weight: Array, rows: slice | None = None) -> Array:
        """Return the adapted tensor: a new array, or `weight` itself if nothing changes.

        Parameters
        ----------
        name
            Name of a tensor of the base.
        weight
            float32 [N, K], or its rows `rows`; not changed.
        rows
            The rows in `weight` (step 1); None means all.

        Raises
        ------
        CheckpointError
            The adapter's tensors do not fit, cannot be read, or hold NaN or infinite values.
        """
        if name in self.replacements:
            whole = self._read(self.replacements[name], rows)
            self._expect(name, whole.shape, weight.shape)
            weight = whole
        if name in self.products:
            product = self.products[name]
            if product.is_embedding:
                a = self._read(product.a)
                change = (a if rows is None else a[:, rows]).T @ self._read(product.b).T
            else:
                change = self._read(product.b, rows) @ self._read(product.a)
            self._expect(name, change.shape, weight.shape)
            change *= np.float32(product.scale)
            change += weight
            return change
        return weight

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `CheckpointError` if the change of a base tensor does not have this shape."""
        if name in self.replacements:
            self._expect(name, self.shapes[self.replacements[name]], shape)
        if name in self.products:
            product = self.products[name]
            a, b = self.shapes[product.a], self.shapes[product.b]
            self._expect(name, (a[1], b[0]) if product.is_embedding else (b[0], a[1]), shape)

    def _expect(self, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
        if found != shape:
            raise CheckpointError(
                f"{self.weights.path} is an adapter for another base: it changes {name} as {list(found)},"
                f" the checkpoint has {list(shape)}"
            )

    def _read(self, key: str, rows: slice | None = None) -> Array:
        return self.weights.tensor(key, self.shapes[key], rows)

    def _check_tied(self) -> None:
        """Check that a matrix that is both embedding and head is changed equally as both; it is then changed once.

        PEFT 0.21 merges the change of either one into the matrix, and with `ensure_weight_tying` both, twice.
        """
        embedding = next((name for name in self.changed_tensors if name.endswith(EMBEDDING)), None)
        if embedding is None and HEAD not in self.changed_tensors:
            return
        if embedding is not None and self.ties_embedding:
            return
        if embedding is not None and {embedding, HEAD} <= set(self.replacements) and HEAD not in self.products:
            first, second = (self._read(self.replacements[name]) for name in (embedding, HEAD))
            if embedding not in self.products and np.array_equal(first, second):
                return
        raise CheckpointError(
            f"{self.weights.path} changes {embedding or HEAD}, but the base stores embedding and head as one matrix:"
            " save the base untied, with a lm_head.weight of its own and tie_word_embeddings false, and export that"
        )


@dataclass(frozen=True, slots=True)
class AdaptedWeights:
    """A checkpoint's weights with an adapter's changes; a `TensorSource` like the checkpoint itself."""

    base: TensorSource
    adapter: Adapter

    def tensor(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> Array:
        """Return one tensor as float32 [*shape], or some of its rows. Raises as `Checkpoint.tensor` does."""
        self.adapter.check_shape(name, shape)
        return self.adapter.apply(name, self.base.tensor(name, shape, rows), rows)


def open_adapter(path: str | Path, config: Mapping[str, Any]) -> Adapter:
    """Open an adapter: a directory or a hub id, with adapter_config.json and adapter_model.safetensors.

    Parameters
    ----------
    path
        The directory or hub id.
    config
        The base's config.json.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, one of a pair of factors is missing, or an option cannot be merged.
    """
    folder = resolve_directory(path)
    options = read_options(folder)
    file = folder / WEIGHTS
    shapes = _shapes(file)
    halves: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    for key in shapes:
        module, kind = _split(key)
        if kind is None:
            replacements[module.replace(".base_layer.", ".")] = key
        else:
            halves.setdefault(module, {})[kind] = key
    ranks_and_scales = options.ranks_and_scales(list(halves))
    products = {
        f"{module}.weight": _product(file, module, found, shapes, *ranks_and_scales[module])
        for module, found in halves.items()
    }
    _check_replacements(file, options, replacements)
    if not products and not replacements:
        raise CheckpointError(f"{file} holds no tensors: the adapter is empty")
    weights = Safetensors(folder, dict.fromkeys(shapes, file))
    tied = config.get("tie_word_embeddings")
    return Adapter(weights, products, replacements, shapes, tied, options.ensure_weight_tying)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the adapter."""
    if not file.is_file():
        hint = "; pickled weights are not read, save it again with peft" if any(file.parent.glob("*.bin")) else ""
        raise CheckpointError(f"{file.parent} has no {WEIGHTS}{hint}")
    try:
        check_file_content(file)
        with safe_open(file, "np") as stored:
            return {key: tuple(stored.get_slice(key).get_shape()) for key in sorted(stored.keys())}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read, it may be truncated: {error}") from error


def _split(key: str) -> tuple[str, str | None]:
    """Return (module, kind of factor) of a tensor of the adapter, or (name of the base's tensor, None)."""
    name = key.removeprefix(PREFIX)
    for ending, kind in FACTORS.items():
        if name.endswith("." + ending):
            return name.removesuffix("." + ending), kind
    return name, None


def _product(
    file: Path, module: str, found: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], rank: int, scale: float
) -> LoraProduct:
    """Return the product of a module's two factors. They must fit each other and the configured rank."""
    is_embedding = any(kind.startswith("embedding") for kind in found)
    kinds = ("embedding A", "embedding B") if is_embedding else ("A", "B")
    if set(found) != set(kinds):
        raise CheckpointError(f"{file}: {module} needs both LoRA factors, A and B; found {', '.join(sorted(found))}")
    a, b = (found[kind] for kind in kinds)
    if len(shapes[a]) != 2 or len(shapes[b]) != 2 or not shapes[a][0] == shapes[b][1] == rank:
        raise CheckpointError(
            f"{file}: {module} has factors {list(shapes[a])} and {list(shapes[b])}, but {CONFIG} says rank {rank}:"
            " they do not belong together"
        )
    return LoraProduct(a, b, scale, is_embedding)


def _check_replacements(file: Path, options: AdapterOptions, replacements: Collection[str]) -> None:
    """Check that every full tensor is one that PEFT saves whole, and that none of these is missing."""
    for name in replacements:
        whole = any(_is_within(name, module) for module in options.modules_to_save)
        if not whole and not f".{name}".endswith((f".{EMBEDDING}", f".{HEAD}")):
            raise CheckpointError(f"{file}: {name} is neither a LoRA factor nor one of modules_to_save")
    for module in options.modules_to_save:
        if not any(_is_within(name, module) for name in replacements):
            raise CheckpointError(f"{file} has no tensor of {module}, listed in modules_to_save")


def _is_within(name: str, module: str) -> bool:
    """Return whether a tensor is in a module with this name suffix; as in PEFT, `norm` matches `input_layernorm`."""
    return f"{module}." in name
