"""Registers the kernels as custom operators of onnxruntime, through its C API.

onnxruntime opens a library and calls its `RegisterCustomOps`; ours calls back into this module, which describes the
operators with ctypes (OrtCustomOp in onnxruntime_c_api.h, API version 16). Python runs only while a graph is loaded; in
a step onnxruntime calls machine code directly.
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
"""Requested version of the C API: the first with `KernelContext_ParallelFor`, onnxruntime 1.17."""
TASKS_PER_MATMUL: Final = 16
"""Maximum number of tasks that a product is divided into for the threads."""

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
"""Indices of functions in OrtApi. They are stable: new versions only append."""

_Status = c_void_p


class _CustomOp(Structure):
    """OrtCustomOp. onnxruntime does not read the null fields at this version."""


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
"""Makes the path of each opened library unique (see `_opened`); process-wide, as the loader's names are."""


class CustomOpLibrary:
    """The operators of a compiled library, with the mapped data file that holds their matrices.

    `sha256` is the library's hash as lowercase hex. Raises `EdgelmError` if the library has another hash, and `OSError`
    if a file cannot be read or the library is a symbolic link. `LIBRARIES` keeps every instance.
    """

    def __init__(self, library: Path, formats: Sequence[WeightFormat], data: Path, sha256: str) -> None:
        self._data = map_file(data)
        self.path = library
        self._code, self._loaded = _load(library, sha256)
        self._kept: list[Any] = []
        self._domain: c_void_p | None = None
        self._functions_state: NDArray[np.uint64] | None = None
        """Template of a node's state: the fields that are equal for all nodes."""
        self._get_attribute: Callable[..., int | None] = _call
        self._create_status: Callable[..., int | None] = _call
        self._error_messages = (c_char_p * len(ERROR_MESSAGES))(
            *(ERROR_MESSAGES[code].encode() for code in sorted(ERROR_MESSAGES))
        )
        self._ops = [
            self._operator(each)
            for each in (ATTENTION_SCHEMA, *map(matmul_schema, formats), *map(gather_schema, formats))
        ]
        self._callback = CFUNCTYPE(_Status, c_void_p, c_void_p)(self._register)
        LIBRARIES.keep(self)

    def register(self, options: Any) -> None:
        """Register the operators for graphs that are loaded with these options, `onnxruntime.SessionOptions`.

        Raises `EdgelmError` if the library file has been replaced since it was loaded.
        """
        set_callback = getattr(self._code, SET_CALLBACK_SYMBOL)
        set_callback.restype = None
        set_callback(self._callback)
        with _opened(self.path) as (descriptor, path):
            if not os.path.samestat(os.fstat(descriptor), self._loaded):
                raise EdgelmError(f"{self.path} is no longer the library that was loaded")
            options.register_custom_ops_library(path)  # same file, so the loader returns the loaded library

    def _address(self, name: str) -> int:
        return ctypes.cast(getattr(self._code, name), c_void_p).value or 0

    def _register(self, options: int, base: int) -> int | None:
        """Implement `RegisterCustomOps`: add the operators to options; return an OrtStatus, None for success."""
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
        """Return the function table (OrtApi) of an OrtApiBase."""
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
        """Create a node: store the address of its state in `kernel`; return an OrtStatus, None for success."""
        try:
            self._store_api_functions(api)
            kernel[0] = self._state(schema, info)
        except Exception as error:  # noqa: BLE001  it must not propagate into onnxruntime's C++
            return self._create_status(_FAIL, f"{schema.name}: {error}".encode())
        return None

    def _store_api_functions(self, api: int) -> None:
        """Store the addresses of onnxruntime's functions, once."""
        if self._functions_state is None:
            functions = (c_void_p * (max(_API.values()) + 1)).from_address(api)
            self._functions_state = np.zeros(len(StateField), np.uint64)
            for field, index in _API.items():
                self._functions_state[field] = functions[index] or 0
            self._functions_state[StateField.ERROR_MESSAGES] = ctypes.addressof(self._error_messages)
            self._create_status = _CREATE_STATUS(functions[_API[StateField.CREATE_STATUS]] or 0)
            self._get_attribute = _GET_ATTRIBUTE(functions[_ATTRIBUTE] or 0)

    def _state(self, schema: OpSchema, info: int) -> int:
        """Return the address of a new node's state. Raises `ValueError` if an attribute is missing or out of range."""
        value = c_int64()
        attributes: dict[StateField, int] = {}
        for field in (*schema.value_attributes, *schema.offset_attributes):
            if self._get_attribute(info, field.name.encode(), ctypes.byref(value)):  # leaks the status, once a load
                raise ValueError(f"a node has no attribute {field.name}")
            attributes[field] = value.value
        if self._functions_state is None:
            raise AssertionError("_store_api_functions runs before _state")
        state = self._functions_state.copy()
        sizes = schema.bytes_at(attributes)
        for field, number in attributes.items():
            state[field] = self._resolve_address(number, sizes[field], field) if field in sizes else number % (1 << 64)
        panels = -(-int(state[StateField.N]) // PANEL_COLUMNS)
        state[StateField.PANELS_PER_TASK] = max(1, -(-panels // TASKS_PER_MATMUL))
        self._kept.append(state)
        return int(state.ctypes.data)

    def _resolve_address(self, offset: int, size: int, field: StateField) -> int:
        """Return the address of `size` bytes at an offset of the data file; null for an optional tensor that is absent.

        Raises `ValueError` if they are not inside the file, or not aligned.
        """
        if offset == NO_OFFSET and field in OPTIONAL_OFFSETS:
            return 0
        if offset < 0 or offset % ALIGN or offset + size > len(self._data):
            raise ValueError(f"{field.name} {offset} is outside the data file or not a multiple of {ALIGN}")
        return int(self._data.ctypes.data) + offset


class LoadedLibraries:
    """Owns the libraries that this process has loaded, and shares those of board cache entries between graphs.

    A library is never released. onnxruntime keeps raw pointers to its ctypes structures and to the states of its nodes,
    and uses them a last time when it destroys the graph. Python cannot report the moment after that: weakref callbacks
    run before, and the garbage collector clears the objects of a cycle in any order. A library costs about 0.1 MB, a
    file descriptor and an address range; the system can drop the pages of its mapped data file.
    """

    def __init__(self) -> None:
        self._all: list[CustomOpLibrary] = []
        self._shared: dict[tuple[Path, int, int], CustomOpLibrary] = {}

    def keep(self, library: CustomOpLibrary) -> None:
        """Keep a library for the life of the process."""
        self._all.append(library)

    def open(self, library: Path, formats: Sequence[WeightFormat], data: Path, sha256: str) -> CustomOpLibrary:
        """Return the library of a board cache entry: the one that is loaded, if its data file is still the same file.

        Raises as `CustomOpLibrary` does.
        """
        status = data.stat()
        key = (library, status.st_ino, status.st_mtime_ns)
        if key not in self._shared:
            self._shared[key] = CustomOpLibrary(library, formats, data, sha256)
        return self._shared[key]


LIBRARIES: Final = LoadedLibraries()
"""The libraries of this process."""


@contextlib.contextmanager
def _opened(library: Path) -> Iterator[tuple[int, str]]:
    """Open a library; yield its file descriptor and a path of that very file, even if the file is replaced meanwhile.

    Each path is spelled differently: a loader takes a path that it has seen for the library that it loaded from it,
    and descriptor numbers are reused.
    """
    descriptor = os.open(library, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        spelling = "".join("./" if bit == "1" else "/" for bit in f"{next(_spellings):b}")
        path = f"/proc/self/fd/{spelling}{descriptor}"
        if not os.path.samestat(os.stat(path), os.fstat(descriptor)):  # noqa: PTH116  Path would normalize it
            raise EdgelmError(f"{path} is not the file {library}: is /proc mounted?")
        yield descriptor, path
    finally:
        os.close(descriptor)


def _load(library: Path, sha256: str) -> tuple[ctypes.CDLL, os.stat_result]:
    """Load a library after checking its hash, both from one open file; return it and the file's status."""
    with _opened(library) as (descriptor, path):
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            found = hashlib.sha256(file.read()).hexdigest()
        if found != sha256:
            raise EdgelmError(f"{library} is not the compiled library: its SHA-256 is {found}, expected {sha256}")
        return ctypes.CDLL(path), os.fstat(descriptor)


def _call(function: int | None, *arguments: Any) -> int | None:
    """Call the function at an address; return its OrtStatus, None for success."""
    kinds = [c_char_p if isinstance(value, bytes) else c_void_p for value in arguments]
    prototype: Callable[..., Callable[..., int | None]] = CFUNCTYPE(_Status, *kinds)
    return prototype(function or 0)(*arguments)
