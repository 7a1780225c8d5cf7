"""Chooses the storage of each matrix under a limit of bytes or of KL divergence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgelm.errors import EdgelmError

from .spec import QuantSpec


@dataclass(frozen=True, slots=True)
class StorageOption:
    """One way to store a matrix: its bytes and its expected KL divergence."""

    spec: QuantSpec | None
    size_bytes: int
    kl: float


@dataclass(frozen=True, slots=True)
class _Upgrade:
    """A step of one matrix to its next larger option."""

    name: str
    index: int
    size_bytes: int
    kl: float

    @property
    def kl_per_byte(self) -> float:
        return self.kl / self.size_bytes


def choose_options(
    options: Mapping[str, Sequence[StorageOption]], *, max_bytes: int | None = None, max_kl: float | None = None
) -> dict[str, StorageOption]:
    """Return an option for each matrix: the least divergence within `max_bytes`, or the fewest bytes for `max_kl`.

    Divergences of matrices are assumed to add up. Starting from the smallest options, upgrades are taken in the order
    of divergence saved per byte, for each matrix along the convex hull of its options. This is optimal except for the
    last step (the Lagrangian argument of Shoham & Gersho 1988, "Efficient bit allocation for an arbitrary set of
    quantizers"). With both limits the upgrades stop when `max_kl` is met. Raises `EdgelmError` if the smallest options
    exceed `max_bytes`.
    """
    hulls = {name: _convex_hull(list(each)) for name, each in options.items()}
    chosen = dict.fromkeys(hulls, 0)
    size = sum(hull[0].size_bytes for hull in hulls.values())
    divergence = sum(hull[0].kl for hull in hulls.values())
    if max_bytes is not None and size > max_bytes:
        raise EdgelmError(f"--max-bytes: the matrices take at least {size} bytes, {max_bytes} are left for them")
    blocked: set[str] = set()
    for step in sorted(_steps(hulls), key=lambda step: (-step.kl_per_byte, step.name)):
        if max_kl is not None and divergence <= max_kl:
            break
        if step.name in blocked or (max_bytes is not None and size + step.size_bytes > max_bytes):
            blocked.add(step.name)  # its later steps require this one
            continue
        chosen[step.name] = step.index
        size += step.size_bytes
        divergence -= step.kl
    return {name: hull[chosen[name]] for name, hull in hulls.items()}


def _convex_hull(options: list[StorageOption]) -> list[StorageOption]:
    """Return the options on the convex hull, smallest first: each saves less divergence per byte than the last."""
    kept: list[StorageOption] = []
    for option in sorted(options, key=lambda each: (each.size_bytes, each.kl)):
        if kept and option.kl >= kept[-1].kl:
            continue
        while len(kept) > 1 and _slope(kept[-2], option) >= _slope(kept[-2], kept[-1]):
            kept.pop()
        if len(kept) == 1 and option.size_bytes == kept[0].size_bytes:
            kept.pop()
        kept.append(option)
    return kept


def _slope(first: StorageOption, second: StorageOption) -> float:
    return (first.kl - second.kl) / max(second.size_bytes - first.size_bytes, 1)


def _steps(hulls: Mapping[str, Sequence[StorageOption]]) -> Iterator[_Upgrade]:
    for name, hull in hulls.items():
        for index in range(1, len(hull)):
            before, after = hull[index - 1], hull[index]
            yield _Upgrade(name, index, after.size_bytes - before.size_bytes, before.kl - after.kl)
