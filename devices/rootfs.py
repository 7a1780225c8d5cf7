"""Debian's arm64 Python and the aarch64 wheels of edgelm, in a folder: what an emulated board runs.

Fetched with apt's and pip's own clients, apt with a state of its own: the machine's architectures, package
lists and installed packages stay as they are, and no root is needed. Knows nothing of boards or of QEMU.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from edgelm.errors import DeviceError
from edgelm.system.installation import install_command
from edgelm.system.ownership import PRIVATE, find_path_fault, make_private

DEBS: Final = ("python3", "libstdc++6", "libgomp1")
"""What is unpacked, with all that it depends on: Python, and what the wheels link against."""

WHEELS: Final = ("numpy", "onnxruntime", "tokenizers", "jinja2", "markupsafe", "llguidance", "paho-mqtt")
"""What inference and MQTT import. Numba (200 MB with LLVM) is left out: greedy decoding never loads it."""

LAYOUT: Final = 1
"""Counted up when the content of a root made by this file changes."""

FETCH_TIMEOUT_S: Final = 900

StatusCallback = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rootfs:
    """An unpacked root (`-L` of QEMU), the wheels beside it, and its Python, as "3.11"."""

    folder: Path
    python: str

    @property
    def root(self) -> Path:
        """The root of the file system."""
        return self.folder / "root"

    @property
    def site(self) -> Path:
        """The unzipped wheels, for sys.path."""
        return self.folder / "site"

    @property
    def interpreter(self) -> Path:
        """The arm64 Python."""
        return self.root / "usr/bin" / f"python{self.python}"


def prepare_rootfs(cache: Path, say: StatusCallback) -> Rootfs:
    """Return the root for this Debian release and the installed versions of `WHEELS`, fetched where needed.

    Parameters
    ----------
    cache
        Holds one folder a root, named by what is in it. A root appears whole or not at all.
    say
        Told, in one line each, what takes time.

    Raises
    ------
    DeviceError
        Not Debian, a tool is missing, no network, no such package, or a folder that others could have written: what
        lies there is executed.
    """
    folder, pins = rootfs_folder(cache), _pinned_wheels()
    fault = find_path_fault(folder)
    if fault is not None:
        raise DeviceError(f"{folder} is not used: {fault}; remove it, or name a folder of your own with --cache")
    if not folder.exists():
        make_private(cache)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=cache) as scratch:
            _build_rootfs(Path(scratch), pins, say)
            _rename_into_place(Path(scratch) / "made", folder)
    return Rootfs(folder, _python_of(folder / "root"))


def rootfs_folder(cache: Path) -> Path:
    """Return where `prepare_rootfs` puts its root, or has put it: the name tells what is in it."""
    digest = hashlib.sha256("\n".join([str(LAYOUT), *DEBS, *_pinned_wheels()]).encode()).hexdigest()[:12]
    return cache / f"debian-{_read_codename()}-arm64-{digest}"


def _pinned_wheels() -> list[str]:
    """Return `WHEELS` in the versions installed here, so that both sides run the same."""
    try:
        return [f"{name}=={metadata.version(name)}" for name in WHEELS]
    except metadata.PackageNotFoundError as error:
        raise DeviceError(
            f"emulation compares with this machine, which lacks {error.name}: {install_command('cpu')}"
        ) from error


def _build_rootfs(scratch: Path, pins: Sequence[str], say: StatusCallback) -> None:
    """Make `scratch/made` with root/ and site/."""
    root, site = scratch / "made/root", scratch / "made/site"
    root.parent.mkdir(PRIVATE)
    root.mkdir()
    site.mkdir()
    say(f"fetching {', '.join(DEBS)} for arm64 with apt (16 MB)")
    for deb in _fetch_debs(scratch / "apt"):
        _run(["dpkg-deb", "--extract", str(deb), str(root)], "unpacking a Debian package")
    if not (root / "lib").exists():  # since Debian 13 the packages hold usr/lib alone
        (root / "lib").symlink_to("usr/lib")
    say(f"fetching {len(pins)} aarch64 wheels with pip (42 MB)")
    for wheel in _fetch_wheels(scratch / "wheels", pins, _python_of(root), _glibc_of(root)):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _fetch_debs(apt: Path) -> list[Path]:
    """Download `DEBS` and their dependencies, with an apt that knows of no installed package."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "state/status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": str(apt / "state"),
        "Dir::State::status": str(apt / "state/status"),
        "Dir::Cache": str(apt / "cache"),
        "Acquire::Retries": "2",
    }
    command = [
        "apt-get",
        "-q",
        *(word for key, value in settings.items() for word in ("-o", f"{key}={value}")),
    ]
    # A failing third-party source must not matter: what is missing shows in the second step.
    subprocess.run([*command, "update"], capture_output=True, timeout=FETCH_TIMEOUT_S, check=False)
    _run(
        [*command, "-y", "--no-install-recommends", "--download-only", "install", *DEBS],
        "fetching arm64 packages with apt (are the network and Debian's mirror within reach?)",
    )
    return sorted((apt / "cache/archives").glob("*.deb"))


def _fetch_wheels(target: Path, pins: Sequence[str], python: str, glibc: int) -> list[Path]:
    """Download the aarch64 wheels for that Python and glibc 2.x."""
    # An older manylinux wheel runs on any newer glibc, and pip wants each tag by name.
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(17, glibc + 1)] + ["manylinux2014_aarch64"]
    abis = [f"cp{python.replace('.', '')}", "abi3", "none"]
    options = ["--only-binary=:all:", "--no-deps", "--python-version", python, "--implementation", "cp"]
    options += [word for tag in platforms for word in ("--platform", tag)]
    options += [word for tag in abis for word in ("--abi", tag)]
    _run(
        [sys.executable, "-I", "-m", "pip", "download", "-q", *options, "-d", str(target), *pins],
        "fetching aarch64 wheels with pip (is the package index within reach?)",
    )
    return sorted(target.glob("*.whl"))


def _run(command: Sequence[str], what: str) -> None:
    """Run a fetching tool; a failure is one `DeviceError` with the tool's own reason."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{what} took longer than {FETCH_TIMEOUT_S} s") from error
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if re.match(r"(E:|ERROR:|dpkg)", line)]
        reason = (reasons or done.stderr.splitlines() or [f"exit status {done.returncode}"])[0]
        raise DeviceError(f"{what} failed: {reason}")


def _rename_into_place(made: Path, folder: Path) -> None:
    """Move the finished root into place; another run that was quicker wins."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _read_codename() -> str:
    """Return the release of this Debian, as "bookworm"; raise `DeviceError` elsewhere."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    if release.get("ID") != "debian" or "VERSION_CODENAME" not in release:
        raise DeviceError(
            "the emulated board is made of Debian packages: run this on Debian 12 or later, or in a "
            f"container of it; found {release.get('PRETTY_NAME', platform.system())}"
        )
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]:
        raise DeviceError(f"the emulated board is made of Debian packages, and {' and '.join(missing)} is missing")
    return release["VERSION_CODENAME"]


def _python_of(root: Path) -> str:
    """Return the version of the root's Python, as "3.11"."""
    return (root / "usr/bin/python3").readlink().name.removeprefix("python")


def _glibc_of(root: Path) -> int:
    """Return x of the root's glibc 2.x."""
    library = (root / "lib/aarch64-linux-gnu/libc.so.6").read_bytes()
    found = re.search(rb"GNU C Library .*? version 2\.(\d+)", library)
    if found is None:
        raise DeviceError(f"cannot tell the version of the C library under {root}")
    return int(found[1])
