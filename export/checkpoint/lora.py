"""LoRA adapters of PEFT's format, added to the checkpoint's weights as they are read.

File and tensor names as PEFT 0.21 writes them; what is added is said in `adapter_options`. The sum is taken in float32,
whatever the adapter was stored in.
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
    """scale * B @ A; of an embedding its transpose. `a` and `b` are tensor names in the adapter."""

    a: str
    b: str
    scale: float
    is_embedding: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """An opened adapter: what it adds to, and what it puts in the place of, tensors of the base.

    `products` and `replacements` are keyed by the base's tensor names; `shapes` are those of the adapter's tensors.
    """

    weights: Safetensors
    products: Mapping[str, LoraProduct]
    replacements: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    tied: bool | None
    ties_embedding: bool

    @property
    def changed(self) -> list[str]:
        """The base's tensors that it changes, sorted."""
        return sorted({*self.products, *self.replacements})

    def check(self, names: Collection[str]) -> None:
        """See that it belongs to a base with tensors of these names.

        Raises `CheckpointError` when one that it changes is not there, or when it would change only one of an
        embedding and a head that the base keeps as one matrix.
        """
        tied = HEAD not in names if self.tied is None else self.tied
        missing = [name for name in self.changed if name not in names and not (tied and name == HEAD)]
        if missing:
            raise CheckpointError(
                f"{self.weights.path} is an adapter for another base: it changes {missing[0]}, which the checkpoint"
                f" does not have ({len(missing)} of {len(self.changed)} tensors are missing)"
            )
        if tied:
            self._check_tied()

    def apply(self, name: str, weight: Array, rows: slice | None = None) -> Array:
        """Return the adapted tensor: a new one, or `weight` itself where nothing changes.

        Parameters
        ----------
        name
            Of a tensor of the base.
        weight
            float32 [N, K], or those of its rows that `rows` names; not changed.
        rows
            Which rows `weight` holds (step 1); all by default.

        Raises
        ------
        CheckpointError
            When the adapter's tensors do not fit, cannot be read, or hold NaN or infinite values.
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
        """Raise `CheckpointError` when what it does to a tensor of the base is not of that tensor's shape."""
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
        """See that a matrix that is both embedding and head is changed as both, alike; it is then changed once.

        peft 0.21 merges the change of either into the one matrix, and both of `ensure_weight_tying` twice.
        """
        embedding = next((name for name in self.changed if name.endswith(EMBEDDING)), None)
        if embedding is None and HEAD not in self.changed:
            return
        if embedding is not None and self.ties_embedding:
            return
        if embedding is not None and {embedding, HEAD} <= set(self.replacements) and HEAD not in self.products:
            first, second = (self._read(self.replacements[name]) for name in (embedding, HEAD))
            if embedding not in self.products and np.array_equal(first, second):
                return
        raise CheckpointError(
            f"{self.weights.path} changes {embedding or HEAD}, but the base keeps embedding and head as one matrix:"
            " save the base untied, with a lm_head.weight of its own and tie_word_embeddings false, and export that"
        )


@dataclass(frozen=True, slots=True)
class AdaptedWeights:
    """A checkpoint's weights with an adapter's changes: a `TensorSource` like the checkpoint itself."""

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
        Where it is.
    config
        The base's config.json.

    Raises
    ------
    CheckpointError
        When a file is missing or damaged, half of a pair is missing, or an option is not one that can be merged.
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
    settings = options.settings(list(halves))
    products = {
        f"{module}.weight": _product(file, module, found, shapes, *settings[module]) for module, found in halves.items()
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
    """Return (module, which factor) of a tensor of the adapter, or (the base's tensor, None)."""
    name = key.removeprefix(PREFIX)
    for ending, kind in FACTORS.items():
        if name.endswith("." + ending):
            return name.removesuffix("." + ending), kind
    return name, None


def _product(
    file: Path, module: str, found: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], rank: int, scale: float
) -> LoraProduct:
    """Pair the two factors of a module; they must agree with each other and with the rank of the options."""
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
    """See that every full tensor is one that PEFT saves whole, and that none of those is missing."""
    for name in replacements:
        whole = any(_is_within(name, module) for module in options.modules_to_save)
        if not whole and not f".{name}".endswith((f".{EMBEDDING}", f".{HEAD}")):
            raise CheckpointError(f"{file}: {name} is no factor of LoRA, nor one of modules_to_save")
    for module in options.modules_to_save:
        if not any(_is_within(name, module) for name in replacements):
            raise CheckpointError(f"{file} has no tensor of {module}, which modules_to_save names")


def _is_within(name: str, module: str) -> bool:
    """Whether a tensor lies in a module whose path ends so; PEFT lets `norm` stand for `input_layernorm` too."""
    return f"{module}." in name
