"""Linking without a linker: the library can be loaded and called, invalid object files are refused."""

from __future__ import annotations

import ctypes
import platform
import struct

import pytest
from llvmlite import binding

from edgelm.kernels.elf import link_shared_library

PLAIN = """
@table = internal constant [4 x i32] [i32 10, i32 20, i32 30, i32 40]
@kept = internal global i32 7
define internal i32 @twice(i32 %x) noinline nounwind {
  %y = add i32 %x, %x
  ret i32 %y
}
define i32 @look(i64 %i) nounwind {
  %p = getelementptr [4 x i32], ptr @table, i64 0, i64 %i
  %v = load i32, ptr %p
  %w = call i32 @twice(i32 %v)
  ret i32 %w
}
define i32 @keep(i32 %x) nounwind {
  %old = load i32, ptr @kept
  store i32 %x, ptr @kept
  ret i32 %old
}
"""


def compiled(code, triple=None, reloc="pic"):
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    triple = triple or f"{platform.machine()}-unknown-linux-gnu"
    machine = binding.Target.from_triple(triple).create_target_machine(opt=1, reloc=reloc, codemodel="small")
    return machine.emit_object(binding.parse_assembly(f'target triple = "{triple}"\n{code}'))


def test_functions_reach_constants_variables_and_each_other(tmp_path):
    library = tmp_path / "one.so"
    library.write_bytes(link_shared_library(compiled(PLAIN), ["look", "keep"]))
    code = ctypes.CDLL(str(library))
    assert [code.look(ctypes.c_int64(i)) for i in range(4)] == [20, 40, 60, 80]
    assert [code.keep(3), code.keep(4), code.keep(5)] == [7, 3, 4]
    with pytest.raises(AttributeError):
        _ = code.twice


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_both_architectures_are_linked(architecture):
    library = link_shared_library(compiled(PLAIN, f"{architecture}-unknown-linux-gnu"), ["look", "keep"])
    assert library.startswith(b"\x7fELF")
    assert struct.unpack_from("<H", library, 18)[0] == {"x86_64": 62, "aarch64": 183}[architecture]
    assert b"\0look\0keep\0" in library


def test_an_undefined_symbol_is_named():
    code = "declare i32 @absent(i32)\ndefine i32 @f(i32 %x) nounwind {\n %y = call i32 @absent(i32 %x)\n ret i32 %y\n}"
    with pytest.raises(ValueError, match="absent"):
        link_shared_library(compiled(code), ["f"])


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"MZ" + bytes(100), bytes(200)])
def test_data_that_is_not_elf_is_refused(data):
    with pytest.raises(ValueError, match="ELF"):
        link_shared_library(data, [])


def test_a_library_is_refused_as_an_object_file():
    with pytest.raises(ValueError, match="object file"):
        link_shared_library(link_shared_library(compiled(PLAIN), ["look"]), ["look"])
