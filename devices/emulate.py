"""The smoke test on an emulated arm64 processor, compared with the same test on this machine.

QEMU's user emulation runs the aarch64 wheels, their kernels and our code with a board's instruction set. It proves that
they work there. It does not measure speed or memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import edgelm
from edgelm.errors import DeviceError
from edgelm.system.board_cache import BoardCache
from edgelm.system.isolated_python import build_command, list_import_paths

from .rootfs import StatusCallback, prepare_rootfs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .board_profile import BoardProfile, Cpu, Emulation

THREADS: Final = 2
"""Threads on both sides. Without it onnxruntime pins threads to cores that do not exist."""

SMOKE_TIMEOUT_S: Final = 900


@dataclass(frozen=True, slots=True)
class EmulationResult:
    """The reports of both sides (`SmokeReport.to_dict`), and the comparison of their tokens."""

    profile: BoardProfile
    emulated: dict[str, Any]
    host: dict[str, Any]

    @property
    def same_tokens(self) -> bool:
        """True if both sides chose the same tokens."""
        return bool(self.emulated["tokens"] == self.host["tokens"])

    @property
    def verdict(self) -> tuple[Literal["ok", "failed", "info"], str]:
        """Status and message of the comparison: fp32 tokens must be equal, quantized kernels differ by processor."""
        count, quant = len(self.host["tokens"]), self.host["quantization"]
        if self.same_tokens:
            return "ok", f"the same {count} tokens as on this machine, in {quant}"
        pairs = zip(self.emulated["tokens"], self.host["tokens"], strict=False)
        first = next((i for i, (emulated, host) in enumerate(pairs) if emulated != host), "the end")
        return (
            "failed" if quant == "fp32" else "info",
            f"tokens differ from this machine's from token {first} on, in {quant}",
        )

    @property
    def ok(self) -> bool:
        """True if every check passed on both sides and the comparison did not fail."""
        return self.emulated["ok"] and self.host["ok"] and self.verdict[0] != "failed"

    def to_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "ok": self.ok,
            "board": self.profile.name,
            "same_tokens": self.same_tokens,
            "emulated": self.emulated,
            "host": self.host,
        }


def default_cache_folder() -> Path:
    """Return the folder of emulated root file systems: `emulate` in the board cache's folder."""
    return BoardCache.default().folder / "emulate"


def emulate(
    profile: BoardProfile, bundle: str, *, prompt: str | None, cache: Path, on_status: StatusCallback
) -> EmulationResult:
    """Run `edgelm devices smoke` on this machine and on the emulated board, and compare the tokens.

    Parameters
    ----------
    profile
        The board.
    bundle, prompt
        As for `smoke.run_smoke_test`.
    cache
        Folder that keeps the emulated root file system between runs; see `default_cache_folder`.
    on_status
        Called with one line before each slow step.

    Raises
    ------
    DeviceError
        QEMU is missing, the root file system cannot be built, the profile has no emulation, or a side returned no
        report.
    """
    if profile.emulation is None or profile.cpu is None:
        raise DeviceError(
            f"{profile.title} cannot be emulated: its profile has no [emulation] with a processor of QEMU"
        )
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        raise DeviceError("emulation needs QEMU's user emulation: apt-get install qemu-user-static")
    rootfs = prepare_rootfs(cache, on_status)
    smoke = ["--bundle", bundle if bundle == "builtin" else str(Path(bundle).resolve())]
    smoke += [] if prompt is None else ["--prompt", prompt]
    with tempfile.TemporaryDirectory(prefix="edgelm-emulate-") as scratch:
        prefix, packages = Path(scratch) / "root", Path(scratch) / "packages"
        write_board_files(prefix, rootfs.root, profile, profile.cpu, profile.emulation)
        packages.mkdir()
        (packages / "edgelm").symlink_to(Path(edgelm.__file__).parent)
        (packages / "edgelm_devices").symlink_to(Path(__file__).parent)
        on_status("running the smoke test on this machine")
        host = _run_smoke([sys.executable], [str(packages), *list_import_paths()], smoke, {}, "this machine")
        on_status(f"running it on an emulated {profile.cpu.core} (slow; the speed is not the board's)")
        compiled = f"pycache_prefix={rootfs.folder / 'pycache'}"
        python = [qemu, "-L", str(prefix), str(rootfs.interpreter), "-X", compiled]
        folders, environment = [str(packages), str(rootfs.site_packages)], {"QEMU_CPU": profile.emulation.qemu_cpu}
        return EmulationResult(profile, _run_smoke(python, folders, smoke, environment, "the emulated board"), host)


def write_board_files(prefix: Path, root: Path, profile: BoardProfile, cpu: Cpu, emulation: Emulation) -> None:
    """Create `prefix`: links to the folders of the root file system, and the board's proc/ and sys/ as files.

    QEMU redirects a path to its prefix if it exists there. With the host's files, onnxruntime fails at import and LLVM
    compiles for the wrong processor.
    """
    prefix.mkdir()
    for entry in root.iterdir():
        (prefix / entry.name).symlink_to(entry)
    everyone = f"0-{cpu.cores - 1}"
    block = (
        f"BogoMIPS\t: 108.00\nFeatures\t: {' '.join(cpu.features)}\n"
        f"CPU implementer\t: {profile.match.implementer}\nCPU architecture: 8\nCPU variant\t: 0x0\n"
        f"CPU part\t: {emulation.part}\nCPU revision\t: 1\n"
    )
    files = {
        "proc/cpuinfo": "\n".join(f"processor\t: {core}\n{block}" for core in range(cpu.cores)),
        "proc/device-tree/model": f"{profile.title} (emulated by QEMU)\0",
        # Empty, because the host's memory and temperature are not the board's.
        "proc/meminfo": "",
        "sys/class/thermal/none": "",
        **{f"sys/devices/system/cpu/{name}": everyone for name in ("possible", "present", "online")},
        "sys/devices/system/cpu/kernel_max": str(cpu.cores - 1),
    }
    for core in range(cpu.cores):
        folder = f"sys/devices/system/cpu/cpu{core}"
        files |= {
            f"{folder}/topology/physical_package_id": "0",
            f"{folder}/topology/core_id": str(core),
            f"{folder}/topology/core_siblings_list": everyone,
            f"{folder}/topology/cluster_cpus_list": everyone,
            f"{folder}/topology/package_cpus_list": everyone,
            f"{folder}/cache/index2/level": "2",
            f"{folder}/cache/index2/size": "512K",
            f"{folder}/cache/index2/shared_cpu_list": str(core),
        }
    for name, text in files.items():
        path = prefix / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def _run_smoke(
    python: Sequence[str], folders: Sequence[str], smoke: Sequence[str], environment: dict[str, str], side: str
) -> dict[str, Any]:
    """Run the smoke test with an interpreter and packages in `folders`; return its report."""
    arguments = ["devices", "smoke", "--json", "--threads", str(THREADS), *smoke]
    command = build_command(python, folders, "edgelm.cli", "main", *arguments)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(
            command,
            env=kept | environment,
            capture_output=True,
            text=True,
            timeout=SMOKE_TIMEOUT_S,
            check=False,
        )
        report: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"the smoke test on {side} took longer than {SMOKE_TIMEOUT_S} s") from error
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DeviceError(
            f"the smoke test on {side} printed no report (exit code {done.returncode}): {last}"
        ) from error
    return report
