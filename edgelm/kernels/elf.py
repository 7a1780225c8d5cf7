"""Links an object file to a shared library, because a board with LLVM has no linker.

Follows the System V ABI (gABI 4.1, chapters 4 and 5; relocations from the x86-64 psABI, table 4.9, and ELF for the Arm
64-bit Architecture, section 5.7). The object file must define every symbol that it refers to. Knows nothing of kernels.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

SEGMENT_ALIGNMENT: Final = 0x10000
"""Alignment of segments in bytes: the largest page of Linux on arm64."""

_ALLOC, _WRITE, _NOBITS, _SYMTAB, _RELA = 2, 1, 8, 2, 4
_EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_SHDR: Final = struct.Struct("<IIQQQQIIQQ")
_SYM: Final = struct.Struct("<IBBHQQ")
_RELOCATION: Final = struct.Struct("<QQq")
_DYNAMIC: Final = struct.Struct("<qQ")
X86_64, AARCH64 = 62, 183
"""Values of e_machine."""


@dataclass(slots=True)
class _Section:
    """A section of the object file; `address` is its address in the library."""

    name: str
    type: int
    flags: int
    size: int
    align: int
    link: int
    info: int
    data: bytes
    address: int = 0


@dataclass(frozen=True, slots=True)
class _Symbol:
    name: str
    section: int
    value: int
    is_global: bool


def link_shared_library(object_file: bytes, exports: Sequence[str]) -> bytes:
    """Return a shared library with the sections of an object file, which exports the named functions.

    Raises `ValueError` if the file is not a 64-bit little-endian ELF object for x86-64 or aarch64, if it refers to a
    symbol that it does not define, and for relocations that the small code model does not use.
    """
    machine, sections = _read_sections(object_file)
    symbols = _read_symbols(sections)
    names = ["", *exports]
    strings = b"".join(name.encode() + b"\0" for name in names)
    table_size = _SYM.size * len(names)
    symbols_at = _EHDR.size + 4 * _PHDR.size
    strings_at = symbols_at + table_size
    hash_at = _align_up(strings_at + len(strings), 8)
    end = hash_at + 4 * (3 + len(names))
    for section in (s for s in sections if s.flags & _ALLOC and not s.flags & _WRITE):
        end = section.address = _align_up(end, section.align)
        end += section.size
    dynamic_at = writable_at = _align_up(end, SEGMENT_ALIGNMENT)
    end = dynamic_at + 6 * _DYNAMIC.size
    for section in (s for s in sections if s.flags & _ALLOC and s.flags & _WRITE):
        end = section.address = _align_up(end, section.align)
        end += section.size
    image = bytearray(end)
    for section in (s for s in sections if s.flags & _ALLOC):
        image[section.address : section.address + section.size] = section.data
    for section in (s for s in sections if s.type == _RELA and sections[s.info].flags & _ALLOC):
        _relocate(image, machine, section, sections, symbols)
    code_size = writable_at
    image[: _EHDR.size] = _EHDR.pack(
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 3, machine, 1, 0, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, 4, 64, 0, 0
    )
    segments = [
        (1, 5, 0, code_size, SEGMENT_ALIGNMENT),  # PT_LOAD, read and execute
        (1, 6, writable_at, end - writable_at, SEGMENT_ALIGNMENT),  # PT_LOAD, read and write
        (2, 6, dynamic_at, 6 * _DYNAMIC.size, 8),  # PT_DYNAMIC
        (0x6474E551, 6, 0, 0, 16),  # PT_GNU_STACK: not executable
    ]
    for i, (kind, flags, at, size, align) in enumerate(segments):
        _PHDR.pack_into(image, _EHDR.size + i * _PHDR.size, kind, flags, at, at, at, size, size, align)
    found = {symbol.name: symbol for symbol in symbols if symbol.section}
    at = 1
    for i, name in enumerate(names[1:], 1):
        symbol = found[name]
        address = sections[symbol.section].address + symbol.value
        _SYM.pack_into(image, symbols_at + i * _SYM.size, at, 0x12, 0, 1, address, 0)  # global function
        at += len(name.encode()) + 1
    image[strings_at : strings_at + len(strings)] = strings
    # one hash bucket for all symbols, which are few
    chain = [*range(2, len(names)), 0] if len(names) > 1 else []
    struct.pack_into(f"<{3 + len(names)}I", image, hash_at, 1, len(names), min(1, len(exports)), 0, *chain)
    entries = ((4, hash_at), (5, strings_at), (6, symbols_at), (10, len(strings)), (11, _SYM.size), (0, 0))
    for i, entry in enumerate(entries):  # DT_HASH, STRTAB, SYMTAB, STRSZ, SYMENT, NULL
        _DYNAMIC.pack_into(image, dynamic_at + i * _DYNAMIC.size, *entry)
    return bytes(image)


def _align_up(at: int, align: int) -> int:
    return -(-at // max(align, 1)) * max(align, 1)


def _read_sections(data: bytes) -> tuple[int, list[_Section]]:
    if data[:7] != b"\x7fELF\x02\x01\x01" or len(data) < _EHDR.size:
        raise ValueError("not a 64-bit little-endian ELF file")
    header = _EHDR.unpack_from(data)
    machine, table, count, names = header[2], header[6], header[12], header[13]
    if header[1] != 1 or machine not in (X86_64, AARCH64):
        raise ValueError("not an object file of x86-64 or aarch64")
    raw = [_SHDR.unpack_from(data, table + i * _SHDR.size) for i in range(count)]
    strings = raw[names][4]
    found = []
    for name, kind, flags, _, at, size, link, info, align, _ in raw:
        content = bytes(size) if kind == _NOBITS else data[at : at + size]
        label = _read_string(data, strings + name)
        own_flags = 0 if label == ".eh_frame" else flags  # no exception is unwound through a kernel
        found.append(_Section(label, kind, own_flags, size, align, link, info, content))
    return machine, found


def _read_string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _read_symbols(sections: Sequence[_Section]) -> list[_Symbol]:
    table = next(section for section in sections if section.type == _SYMTAB)
    strings = sections[table.link].data
    return [
        _Symbol(_read_string(strings, name), section, value, bool(info >> 4))
        for name, info, _, section, value, _ in _SYM.iter_unpack(table.data)
    ]


def _relocate(
    image: bytearray, machine: int, table: _Section, sections: Sequence[_Section], symbols: Sequence[_Symbol]
) -> None:
    """Apply the relocations of a section to the image."""
    base = sections[table.info].address
    for offset, info, addend in _RELOCATION.iter_unpack(table.data):
        symbol = symbols[info >> 32]
        if symbol.section == 0 or not sections[symbol.section].flags & _ALLOC:
            raise ValueError(f"{symbol.name or 'a section'} is not part of the object file")
        target = sections[symbol.section].address + symbol.value + addend
        location = base + offset
        kind = info & 0xFFFFFFFF
        if machine == X86_64:
            if kind not in (2, 4):  # R_X86_64_PC32, R_X86_64_PLT32
                raise ValueError(f"relocation {kind} of {symbol.name} is not of the small code model")
            struct.pack_into("<i", image, location, target - location)
        else:
            word = struct.unpack_from("<I", image, location)[0]
            struct.pack_into("<I", image, location, word | _arm_field(kind, target, location))


_ARM_SCALE: Final = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}
"""Right shift of the low 12 bits of an address, by relocation: ADD and LDST8 to LDST128."""


def _arm_field(kind: int, target: int, location: int) -> int:
    """Return the bits that a relocation sets in an Arm instruction."""
    if kind == 275:  # R_AARCH64_ADR_PREL_PG_HI21
        pages = (target >> 12) - (location >> 12)
        return (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    if kind in _ARM_SCALE:
        return (target & 0xFFF) >> _ARM_SCALE[kind] << 10
    if kind in (282, 283):  # R_AARCH64_JUMP26, R_AARCH64_CALL26
        return (target - location) >> 2 & 0x3FFFFFF
    raise ValueError(f"relocation {kind} is not of the small code model")
