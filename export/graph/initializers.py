"""Constants of a graph: small ones inside model.onnx, large ones appended to one external data file."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import StringStringEntryProto, TensorProto, helper, numpy_helper

INLINE_BYTES: Final = 4096
"""Arrays up to this size stay inside model.onnx."""

ALIGNMENT: Final = 4096
"""External tensors start on page boundaries, so that a runtime can map them."""


class FileInitializers:
    """Collects tensors by name. A large array is written to the data file at once and not kept in memory."""

    def __init__(self, data_file: Path) -> None:
        self._path = data_file
        self._stream = data_file.open("wb")
        self.tensors: dict[str, TensorProto] = {}

    def __enter__(self) -> FileInitializers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, name: str, array: NDArray[Any]) -> str:
        """Store an array under a new name and return the name."""
        if name in self.tensors:
            raise AssertionError(f"initializer {name} added twice")
        if array.nbytes <= INLINE_BYTES:
            self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
            return name
        offset = -(-self._stream.tell() // ALIGNMENT) * ALIGNMENT
        self._stream.seek(offset)
        np.ascontiguousarray(array).tofile(self._stream)
        self.tensors[name] = external_tensor(name, array.dtype, array.shape, self._path.name, offset, array.nbytes)
        return name

    def alias(self, name: str, of: str, shape: tuple[int, ...]) -> str:
        """Give the bytes of another tensor a second name and shape. They are stored and mapped once."""
        self.tensors[name] = alias_tensor(self.tensors[of], name, shape)
        return name


class InlineInitializers:
    """Constants of a graph that is only loaded from memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorProto] = {}

    def add(self, name: str, array: NDArray[Any]) -> str:
        """Store an array under a new name and return the name."""
        self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def alias(self, name: str, of: str, shape: tuple[int, ...]) -> str:
        """Not supported: a graph in memory has no tables of packed codes."""
        raise AssertionError(f"{name} of {of} {shape} needs a data file")


class CountedInitializers:
    """Counts the bytes of constants without storing them: `total_bytes`, without the graph's own entries for them."""

    def __init__(self, location: str) -> None:
        self._location = location
        self.tensors: dict[str, TensorProto] = {}
        self.total_bytes = 0
        self._end = 0

    def add(self, name: str, array: NDArray[Any]) -> str:
        """Count an array under a new name and return the name."""
        return self.add_shape(name, array.dtype, array.shape)

    def add_shape(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
        """Count an array of a shape under a new name and return the name."""
        length = dtype.itemsize * math.prod(shape)
        if length <= INLINE_BYTES:
            self.total_bytes += length + 4  # the length field before it
            self.tensors[name] = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(dtype), dims=shape)
            return name
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        self.total_bytes += offset + length - self._end
        self._end = offset + length
        self.tensors[name] = external_tensor(name, dtype, shape, self._location, offset, length)
        return name

    def alias(self, name: str, of: str, shape: tuple[int, ...]) -> str:
        """Give the bytes of another tensor a second name and shape, which adds no bytes."""
        self.tensors[name] = alias_tensor(self.tensors[of], name, shape)
        return name


def external_tensor(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], location: str, offset: int, length: int
) -> TensorProto:
    """Return a tensor whose bytes are in another file."""
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(dtype), dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.append(StringStringEntryProto(key=key, value=value))
    return tensor


def alias_tensor(tensor: TensorProto, name: str, shape: tuple[int, ...]) -> TensorProto:
    """Return the same bytes under another name and shape."""
    other = TensorProto()
    other.CopyFrom(tensor)
    other.name = name
    other.dims[:] = shape
    return other
