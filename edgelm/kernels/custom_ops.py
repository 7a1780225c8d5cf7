"""Handing the kernels to onnxruntime as custom operators, through its C API.

onnxruntime opens a library and calls its `RegisterCustomOps`; ours calls back into this module, which describes the
operators with ctypes (OrtCustomOp in onnxruntime_c_api.h, as of API version 16). Python is asked while a graph is
loaded; in a step onnxruntime calls machine code alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgelmError
from edgelm.graph.domain import DOMAIN
from edgelm.kernels.abi import (
    ALIGN,
    DESTROY,
    ERROR_MESSAGES,
    NO_OFFSET,
    PANEL_COLUMNS,
    SET_CALLBACK_SYMBOL,
    StateField,
    WeightFormat,
)
from edgelm.kernels.huge_pages import map_file
from edgelm.kernels.op_schemas import ATTENTION_SCHEMA, OPTIONAL_OFFSETS, OpSchema, gather_schema, matmul_schema

ORT_API_VERSION: Final = 17
"""Version of the C API that is asked for: the first with `KernelContext_ParallelFor`, onnxruntime 1.17."""
TASKS_PER_MATMUL: Final = 16
"""Parts that a product is cut into for the threads, where it is large enough."""

_REQUIRED, _OPTIONAL = 0, 1
_FAIL = 1
"""OrtErrorCode."""
_CREATE_DOMAIN, _DOMAIN_ADD, _ADD_DOMAIN, _ATTRIBUTE = 26, 27, 28, 86
_API: Final = {
    StateField.GET_INPUT: 90,
    StateField.GET_OUTPUT: 91,
    StateField.GET_DATA: 51,
    StateField.GET_SHAPE: 65,
    StateField.GET_RANK: 61,
    StateField.GET_DIMENSIONS: 62,
    StateField.RELEASE_SHAPE: 99,
    StateField.PARALLEL_FOR: 274,
    StateField.CREATE_STATUS: 0,
}
"""Places of functions in OrtApi, which onnxruntime only ever adds to."""

_Status = c_void_p


class _CustomOp(Structure):
    """OrtCustomOp; what is null is not asked for at this version."""


_Op = POINTER(_CustomOp)
_GET_ATTRIBUTE = CFUNCTYPE(_Status, c_void_p, c_char_p, POINTER(c_int64))
_CREATE_STATUS = CFUNCTYPE(_Status, c_int, c_char_p)
_NAME = CFUNCTYPE(c_void_p, _Op)
_TYPE = CFUNCTYPE(c_int, _Op, c_size_t)
_COUNT = CFUNCTYPE(c_size_t, _Op)
_CREATE = CFUNCTYPE(_Status, _Op, c_void_p, c_void_p, POINTER(c_void_p))
_NUMBER = CFUNCTYPE(c_int, _Op)
_CustomOp._fields_ = [
    ("version", c_uint32),
    ("create_kernel_without_status", c_void_p),
    ("name", _NAME),
    ("provider", _NAME),
    ("input_type", _TYPE),
    ("input_count", _COUNT),
    ("output_type", _TYPE),
    ("output_count", _COUNT),
    ("compute_without_status", c_void_p),
    ("destroy", c_void_p),
    ("input_kind", _TYPE),
    ("output_kind", _TYPE),
    ("input_memory", _TYPE),
    ("variadic", _NUMBER * 4),
    ("create_kernel", _CREATE),
    ("compute", c_void_p),
    ("later", c_void_p * 7),
]


_spellings = itertools.count(1)

_loaded_libraries: list[CustomOpLibrary] = []
"""All there are: graphs call what they hold, and nobody tells when the last one is gone."""


class CustomOpLibrary:
    """The operators of a compiled library, whose matrices lie in a file. Lives as long as the process.

    `sha256` is the library's hash as lowercase hex. Raises `EdgelmError` for a library of another hash, and `OSError`
    for one that cannot be read or is a symbolic link.
    """

    def __init__(self, library: Path, formats: Sequence[WeightFormat], data: Path, sha256: str) -> None:
        self._data = map_file(data)
        self.path = library
        self._code, self._loaded = _load(library, sha256)
        self._kept: list[Any] = []
        self._domain: c_void_p | None = None
        self._functions_state: NDArray[np.uint64] | None = None
        """A node's state but for what differs from node to node."""
        self._get_attribute: Callable[..., int | None] = _call
        self._create_status: Callable[..., int | None] = _call
        self._faults = (c_char_p * len(ERROR_MESSAGES))(
            *(ERROR_MESSAGES[fault].encode() for fault in sorted(ERROR_MESSAGES))
        )
        self._ops = [
            self._operator(each)
            for each in (ATTENTION_SCHEMA, *map(matmul_schema, formats), *map(gather_schema, formats))
        ]
        self._hook = CFUNCTYPE(_Status, c_void_p, c_void_p)(self._register)
        _loaded_libraries.append(self)

    def register(self, options: Any) -> None:
        """Make the operators known to graphs that are loaded with these options.

        Raises `EdgelmError` when another library lies in the place of the one that was loaded.
        """
        set_hook = getattr(self._code, SET_CALLBACK_SYMBOL)
        set_hook.restype = None
        set_hook(self._hook)
        with _opened(self.path) as (descriptor, path):
            if not os.path.samestat(os.fstat(descriptor), self._loaded):
                raise EdgelmError(f"{self.path} is no longer the library that was loaded")
            options.register_custom_ops_library(path)  # the loader knows the file and gives the same library

    def _address(self, name: str) -> int:
        return ctypes.cast(getattr(self._code, name), c_void_p).value or 0

    def _register(self, options: int, base: int) -> int | None:
        """Add the operators to options, for `RegisterCustomOps`; return an OrtStatus, or None for success."""
        api = self._functions(base)
        if self._domain is None:
            domain = c_void_p()
            status = _call(api[_CREATE_DOMAIN], DOMAIN.encode(), ctypes.byref(domain))
            for op in self._ops:
                status = status or _call(api[_DOMAIN_ADD], domain, ctypes.byref(op))
            if status:
                return status
            self._domain = domain
        return _call(api[_ADD_DOMAIN], c_void_p(options), self._domain)

    def _functions(self, base: int) -> Any:
        """Return the table of functions that an OrtApiBase gives."""
        get_api = CFUNCTYPE(c_void_p, c_uint32)(c_void_p.from_address(base).value or 0)
        table = get_api(ORT_API_VERSION)
        return (c_void_p * (max(_API.values()) + 1)).from_address(table)

    def _operator(self, schema: OpSchema) -> _CustomOp:
        name = ctypes.create_string_buffer(schema.name.encode())
        provider = ctypes.create_string_buffer(b"CPUExecutionProvider")
        op = _CustomOp(
            version=ORT_API_VERSION,
            create_kernel=_CREATE(lambda _, api, info, kernel: self._create(schema, api, info, kernel)),
            name=_NAME(lambda _: ctypes.addressof(name)),
            provider=_NAME(lambda _: ctypes.addressof(provider)),
            input_type=_TYPE(lambda _, index: schema.inputs[index]),
            input_count=_COUNT(lambda _: len(schema.inputs)),
            output_type=_TYPE(lambda _, index: schema.outputs[index]),
            output_count=_COUNT(lambda _: len(schema.outputs)),
            compute=self._address(schema.symbol),
            destroy=self._address(DESTROY),
            input_kind=_TYPE(lambda _, index: _OPTIONAL if index in schema.optional else _REQUIRED),
            output_kind=_TYPE(lambda _, __: _REQUIRED),
            input_memory=_TYPE(lambda _, __: 0),
            variadic=(_NUMBER * 4)(*[_NUMBER(lambda _: 0)] * 4),
        )
        self._kept += [name, provider, op]
        return op

    def _create(self, schema: OpSchema, api: int, info: int, kernel: Any) -> int | None:
        """Hand over the address of the state of a node; return an OrtStatus, or None for success."""
        try:
            self._store_api_functions(api)
            kernel[0] = self._state(schema, info)
        except Exception as error:  # noqa: BLE001  it would end in onnxruntime's C++
            return self._create_status(_FAIL, f"{schema.name}: {error}".encode())
        return None

    def _store_api_functions(self, api: int) -> None:
        """Note where onnxruntime's functions are."""
        if self._functions_state is None:
            functions = (c_void_p * (max(_API.values()) + 1)).from_address(api)
            self._functions_state = np.zeros(len(StateField), np.uint64)
            for field, place in _API.items():
                self._functions_state[field] = functions[place] or 0
            self._functions_state[StateField.ERROR_MESSAGES] = ctypes.addressof(self._faults)
            self._create_status = _CREATE_STATUS(functions[_API[StateField.CREATE_STATUS]] or 0)
            self._get_attribute = _GET_ATTRIBUTE(functions[_ATTRIBUTE] or 0)

    def _state(self, schema: OpSchema, info: int) -> int:
        """Return the address of the state of a node. Raises `ValueError` for attributes that do not fit."""
        value = c_int64()
        attributes: dict[StateField, int] = {}
        for field in (*schema.value_attributes, *schema.offset_attributes):
            if self._get_attribute(info, field.name.encode(), ctypes.byref(value)):  # the status is lost: at load only
                raise ValueError(f"a node has no {field.name}")
            attributes[field] = value.value
        if self._functions_state is None:
            raise AssertionError("the functions were noted before")
        state = self._functions_state.copy()
        sizes = schema.bytes_at(attributes)
        for field, number in attributes.items():
            state[field] = self._resolve_address(number, sizes[field], field) if field in sizes else number % (1 << 64)
        panels = -(-int(state[StateField.N]) // PANEL_COLUMNS)
        state[StateField.PANELS_PER_TASK] = max(1, -(-panels // TASKS_PER_MATMUL))
        self._kept.append(state)
        return int(state.ctypes.data)

    def _resolve_address(self, offset: int, size: int, field: StateField) -> int:
        """Return the address of something in the file; null where there is nothing."""
        if offset == NO_OFFSET and field in OPTIONAL_OFFSETS:
            return 0
        if offset < 0 or offset % ALIGN or offset + size > len(self._data):
            raise ValueError(f"{field.name} lies outside the file of matrices")
        return int(self._data.ctypes.data) + offset


@contextlib.contextmanager
def _opened(library: Path) -> Iterator[tuple[int, str]]:
    """Open a library; yield its descriptor and a path that leads to that file, whatever its name leads to by then.

    No two of the paths are spelled alike: a loader that is given the path of a library that it has loaded before takes
    it for that one, and descriptors are used again.
    """
    descriptor = os.open(library, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        spelling = "".join("./" if bit == "1" else "/" for bit in f"{next(_spellings):b}")
        path = f"/proc/self/fd/{spelling}{descriptor}"
        if not os.path.samestat(os.stat(path), os.fstat(descriptor)):  # noqa: PTH116  no Path for what is not ours
            raise EdgelmError(f"{path} is another file than {library}: is /proc mounted?")
        yield descriptor, path
    finally:
        os.close(descriptor)


def _load(library: Path, sha256: str) -> tuple[ctypes.CDLL, os.stat_result]:
    """Load the very file that is hashed; return it, and what tells that file from others."""
    with _opened(library) as (descriptor, path):
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            found = hashlib.sha256(file.read()).hexdigest()
        if found != sha256:
            raise EdgelmError(f"{library} is not the library that was compiled: its SHA-256 is {found}, not {sha256}")
        return ctypes.CDLL(path), os.fstat(descriptor)


def _call(function: int | None, *arguments: Any) -> int | None:
    """Call a function that returns an OrtStatus, null for success."""
    kinds = [c_char_p if isinstance(value, bytes) else c_void_p for value in arguments]
    prototype: Callable[..., Callable[..., int | None]] = CFUNCTYPE(_Status, *kinds)
    return prototype(function or 0)(*arguments)
