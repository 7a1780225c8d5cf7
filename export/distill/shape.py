"""The shape of a student, from a short text such as `hidden=192,layers=6,heads=6,kv-heads=2,mlp=512`."""

from __future__ import annotations

from dataclasses import dataclass

from edgelm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StudentShape:
    """A Llama-shaped decoder with a tied head.

    Parameters
    ----------
    hidden, mlp
        Widths; multiples of 32, the default block size of int4.
    layers, heads, kv_heads
        Counts; `heads` is a multiple of `kv_heads`.
    head
        Head size, a multiple of 16, as required by rotary positions in GroupQueryAttention.
    """

    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    mlp: int = 512
    head: int = 0  # 0 means hidden / heads

    def __post_init__(self) -> None:
        if not self.head:
            if self.hidden % self.heads:
                raise ConfigError(f"hidden={self.hidden} is not a multiple of heads={self.heads}: add head=SIZE")
            object.__setattr__(self, "head", self.hidden // self.heads)
        for name, value, multiple in (
            ("hidden", self.hidden, 32),
            ("mlp", self.mlp, 32),
            ("head", self.head, 16),
            ("heads", self.heads, self.kv_heads),
        ):
            if value % multiple:
                raise ConfigError(f"student shape: {name}={value} must be a multiple of {multiple}")


def parse_shape(text: str) -> StudentShape:
    """Parse `name=number,...`; missing names have their defaults.

    Raises
    ------
    ConfigError
        A name is unknown, a value is not a positive integer, or the numbers do not fit each other.
    """
    names = {field.replace("_", "-"): field for field in StudentShape.__dataclass_fields__}
    values: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in names:
            raise ConfigError(
                f"student shape {text!r}: unknown name {name!r}; known: {', '.join(names)}, "
                "as in hidden=192,layers=6,heads=6,kv-heads=2,mlp=512"
            )
        if not value.isdecimal() or not int(value):
            raise ConfigError(f"student shape {text!r}: {name} must be a positive integer, got {value!r}")
        values[names[name]] = int(value)
    return StudentShape(**values)
