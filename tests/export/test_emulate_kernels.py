"""Our kernels on an emulated Cortex-A76. They are compiled here, because the emulated root has no LLVM."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from edgelm_devices.board_profile import load_profile
from edgelm_devices.emulate import default_cache_folder, write_board_files
from edgelm_devices.rootfs import prepare_rootfs, rootfs_folder

import edgelm
from edgelm.errors import DeviceError
from edgelm.kernels.abi import SUPPORTED_FORMATS
from edgelm.kernels.compiler import compile_kernels
from edgelm.kernels.ir.targets import TARGETS

HELPERS = Path(__file__).parents[1] / "support"
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import naive_kernels as naive
from attention_cases import Case, check_case
from naive_kernel_attention import Shape
from kernel_nodes import gather_rows, matrix, product, run
from edgelm.system.digest import file_sha256
from edgelm.kernels.abi import SUPPORTED_FORMATS
from edgelm.kernels.custom_ops import CustomOpLibrary

library = Path(sys.argv[1])
rng = np.random.default_rng(0)
for fmt in SUPPORTED_FORMATS:
    for size, columns, rows in ((150, 40, 7), (64, 16, 1), (33, 5, 2)):
        codes, scales, bias = matrix(rng, fmt, size, columns)
        x = rng.normal(size=(rows, size)).astype(np.float32)
        session = product(library, fmt, size, codes, scales, bias=bias)
        found = run(session, x)
        expected = naive.matmul(x, codes, scales, fmt.bits, fmt.block_size, bias)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        for row in range(rows):
            np.testing.assert_array_equal(run(session, x[row : row + 1])[0], found[row])
        if size % fmt.block_size == 0:
            table = [[w * np.float32(s) for w, s in naive.row(codes, scales, fmt.bits, n)] for n in range(columns)]
            found_rows = gather_rows(library, fmt, codes, scales, np.arange(columns))
            np.testing.assert_array_equal(found_rows, np.array(table, np.float32))
        skip = rng.normal(size=(rows, columns)).astype(np.float32)
        session = product(library, fmt, size, codes, scales, bias=bias, skip=True)
        np.testing.assert_array_equal(run(session, x, skip), found + skip)
        gates, values = rng.normal(size=(2, rows, size)).astype(np.float32)
        gated = np.array([[naive.silu(g) * v for g, v in zip(*pair)] for pair in zip(gates, values)], np.float32)
        found = run(product(library, fmt, size, codes, scales, gated=True), np.concatenate([gates, values], 1))
        np.testing.assert_allclose(found, naive.matmul(gated, codes, scales, fmt.bits, fmt.block_size, None), atol=0.2)
        weight = rng.normal(size=size).astype(np.float32)
        normed = np.array([naive.normed(row, weight, 1e-5) for row in x], np.float32)
        found = run(product(library, fmt, size, codes, scales, norm=weight, epsilon=1e-5), x)
        np.testing.assert_allclose(found, naive.matmul(normed, codes, scales, fmt.bits, fmt.block_size, None), atol=0.2)
data = library.with_name("data")
data.write_bytes(b"none")
operators = CustomOpLibrary(library, [], data, file_sha256(library))
for shape in (Shape(6, 2, 64, half=32, scale=0.125), Shape(7, 1, 48, half=5, window=40, softcap=20.0, scale=0.2)):
    check_case(operators, Case(shape, 0, batch=2, longest=150))
    check_case(operators, Case(shape, 1, tokens=20, lengths=[120]), packed=False)
print("right")
"""


@pytest.fixture
def emulated_root():
    """An existing root and the path of QEMU; see test_emulate.py."""
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        pytest.skip("emulation needs QEMU: apt-get install qemu-user-static")
    try:
        folder = rootfs_folder(default_cache_folder())
    except DeviceError as error:
        pytest.skip(str(error))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: `edgelm devices emulate pi5` fetches it")
    return prepare_rootfs(default_cache_folder(), print), qemu


def test_kernels_are_correct_on_an_emulated_pi5(emulated_root, tmp_path):
    rootfs, qemu = emulated_root
    profile = load_profile("pi5")
    target = next(target for target in TARGETS if target.name == "dotprod")
    library = tmp_path / "kernels.so"
    library.write_bytes(compile_kernels(target, SUPPORTED_FORMATS, profile.emulation.qemu_cpu))
    write_board_files(tmp_path / "root", rootfs.root, profile, profile.cpu, profile.emulation)
    packages = [Path(edgelm.__file__).parents[1], HELPERS, rootfs.site_packages]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {
        "QEMU_CPU": profile.emulation.qemu_cpu,
        "PYTHONPATH": os.pathsep.join(map(str, packages)),
        "PYTHONPYCACHEPREFIX": str(rootfs.folder / "pycache"),
    }
    command = [qemu, "-L", str(tmp_path / "root"), str(rootfs.interpreter), "-c", PROGRAM, str(library)]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "right"), done.stderr
