"""The smoke test on an emulated arm64 processor, and whether it answers as this machine does.

QEMU's user emulation runs the real aarch64 wheels, their kernels and our code on a board's instruction set.
It proves that they work there; of speed and memory it says nothing.
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
"""Set on both sides: onnxruntime would otherwise pin threads to cores that are not there."""

SMOKE_TIMEOUT_S: Final = 900


@dataclass(frozen=True, slots=True)
class EmulationResult:
    """What both sides reported (see `smoke.Report.to_dict`), and where their answers part."""

    profile: BoardProfile
    emulated: dict[str, Any]
    host: dict[str, Any]

    @property
    def same_tokens(self) -> bool:
        """Whether both chose the same tokens, one by one."""
        return bool(self.emulated["tokens"] == self.host["tokens"])

    @property
    def verdict(self) -> tuple[Literal["ok", "failed", "info"], str]:
        """How the tokens compare. At fp32 they must agree; quantized kernels differ from processor to processor."""
        count, quant = len(self.host["tokens"]), self.host["quantization"]
        if self.same_tokens:
            return "ok", f"the same {count} tokens as on this machine, at {quant}"
        pairs = zip(self.emulated["tokens"], self.host["tokens"], strict=False)
        first = next((at for at, (theirs, ours) in enumerate(pairs) if theirs != ours), "the end")
        return "failed" if quant == "fp32" else "info", f"not those of this machine from token {first} on, at {quant}"

    @property
    def ok(self) -> bool:
        """Whether every check passed on both sides, and the tokens agree where they must."""
        return self.emulated["ok"] and self.host["ok"] and self.verdict[0] != "failed"

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "ok": self.ok,
            "board": self.profile.name,
            "same_tokens": self.same_tokens,
            "emulated": self.emulated,
            "host": self.host,
        }


def default_cache_folder() -> Path:
    """Return where emulated roots are kept: `emulate` in the board cache's folder."""
    return BoardCache.default().folder / "emulate"


def emulate(
    profile: BoardProfile, bundle: str, *, prompt: str | None, cache: Path, say: StatusCallback
) -> EmulationResult:
    """Run `edgelm devices smoke` here and on the emulated board, and compare the answers.

    Parameters
    ----------
    profile
        The board.
    bundle, prompt
        As for `smoke.run_smoke`.
    cache
        Where the emulated root is kept for the next time; see `default_cache_folder`.
    say
        Told, in one line each, what takes time.

    Raises
    ------
    DeviceError
        QEMU is missing, the root cannot be made, the profile cannot be emulated, or a side gave no report.
    """
    if profile.emulation is None or profile.cpu is None:
        raise DeviceError(f"{profile.title} cannot be emulated: its profile names no processor for QEMU")
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        raise DeviceError("emulation needs QEMU's user emulation: apt-get install qemu-user-static")
    rootfs = prepare_rootfs(cache, say)
    smoke = ["--bundle", bundle if bundle == "builtin" else str(Path(bundle).resolve())]
    smoke += [] if prompt is None else ["--prompt", prompt]
    with tempfile.TemporaryDirectory(prefix="edgelm-emulate-") as scratch:
        prefix, packages = Path(scratch) / "root", Path(scratch) / "packages"
        write_board_files(prefix, rootfs.root, profile, profile.cpu, profile.emulation)
        packages.mkdir()
        (packages / "edgelm").symlink_to(Path(edgelm.__file__).parent)
        (packages / "edgelm_devices").symlink_to(Path(__file__).parent)
        say("running the smoke test on this machine")
        host = _run_smoke([sys.executable], [str(packages), *list_import_paths()], smoke, {}, "this machine")
        say(f"running it on an emulated {profile.cpu.core} (slowly: this says nothing of the board's speed)")
        compiled = f"pycache_prefix={rootfs.folder / 'pycache'}"
        python = [qemu, "-L", str(prefix), str(rootfs.interpreter), "-X", compiled]
        folders, environment = [str(packages), str(rootfs.site)], {"QEMU_CPU": profile.emulation.qemu_cpu}
        return EmulationResult(profile, _run_smoke(python, folders, smoke, environment, "the emulated board"), host)


def write_board_files(prefix: Path, root: Path, profile: BoardProfile, cpu: Cpu, emulation: Emulation) -> None:
    """Make `prefix`: the root's folders as links, and the proc/ and sys/ of the board as files.

    QEMU takes any path that exists under its prefix from there. The host's own would end onnxruntime at
    import, which reads them, and would make LLVM compile for the wrong processor.
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
        # The host's memory and temperature are not the board's: tell none.
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
    """Run the smoke test with that interpreter and the packages in some folders; return its report."""
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
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise DeviceError(f"the smoke test on {side} gave no report (exit {done.returncode}): {last}") from error
    return report
