"""The root file system of an emulated board: Debian's arm64 Python and the aarch64 wheels of edgelm, in a folder.

The files are downloaded with apt and pip. apt uses a separate state folder: the machine's architectures, package lists
and installed packages do not change, and root rights are not needed. Knows nothing of boards or of QEMU.
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
from edgelm.system.ownership import PRIVATE_MODE, find_path_fault, make_private

DEBS: Final = ("python3", "libstdc++6", "libgomp1")
"""Debian packages to unpack, with their dependencies: Python, and the libraries that the wheels link to."""

WHEELS: Final = (
    "jinja2",
    "llguidance",
    "markupsafe",
    "msgspec",
    "numpy",
    "onnxruntime",
    "paho-mqtt",
    "platformdirs",
    "protobuf",
    "tokenizers",
)
"""Packages that inference and MQTT import, without Numba (200 MB with LLVM): greedy decoding does not load it."""

LAYOUT: Final = 1
"""Version of the content that this module builds; increase it with every change."""

FETCH_TIMEOUT_S: Final = 900

StatusCallback = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rootfs:
    """An unpacked root file system (`-L` of QEMU) with its wheels; `python` is a version such as "3.11"."""

    folder: Path
    python: str

    @property
    def root(self) -> Path:
        """The root of the file system."""
        return self.folder / "root"

    @property
    def site_packages(self) -> Path:
        """The unzipped wheels, for sys.path."""
        return self.folder / "site"

    @property
    def interpreter(self) -> Path:
        """The arm64 Python."""
        return self.root / "usr/bin" / f"python{self.python}"


def prepare_rootfs(cache: Path, on_status: StatusCallback) -> Rootfs:
    """Return the root file system for this Debian release and the installed versions of `WHEELS`; build it if needed.

    Parameters
    ----------
    cache
        Folder of root file systems, each named by its content. A root appears there only when it is complete.
    on_status
        Called with one line before each slow step.

    Raises
    ------
    DeviceError
        This is not Debian, a tool or package is missing, there is no network, or other users can write to the folder,
        whose files are executed.
    """
    folder, pins = rootfs_folder(cache), _pinned_wheels()
    fault = find_path_fault(folder)
    if fault is not None:
        raise DeviceError(f"{folder} is not used: {fault}; remove it, or name a folder of your own with --cache")
    if not folder.exists():
        make_private(cache)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=cache) as scratch:
            _build_rootfs(Path(scratch), pins, on_status)
            _rename_into_place(Path(scratch) / "made", folder)
    return Rootfs(folder, _python_of(folder / "root"))


def rootfs_folder(cache: Path) -> Path:
    """Return the folder of the root that `prepare_rootfs` builds; its name contains a hash of the content."""
    digest = hashlib.sha256("\n".join([str(LAYOUT), *DEBS, *_pinned_wheels()]).encode()).hexdigest()[:12]
    return cache / f"debian-{_read_codename()}-arm64-{digest}"


def _pinned_wheels() -> list[str]:
    """Return `WHEELS` with the versions installed on this machine, so that both sides run the same ones."""
    try:
        return [f"{name}=={metadata.version(name)}" for name in WHEELS]
    except metadata.PackageNotFoundError as error:
        raise DeviceError(f"emulation needs {error.name} on this machine too: {install_command('cpu')}") from error


def _build_rootfs(scratch: Path, pins: Sequence[str], on_status: StatusCallback) -> None:
    """Create `scratch/made` with root/ and site/."""
    root, site = scratch / "made/root", scratch / "made/site"
    root.parent.mkdir(PRIVATE_MODE)
    root.mkdir()
    site.mkdir()
    on_status(f"downloading {', '.join(DEBS)} for arm64 with apt (16 MB)")
    for deb in _fetch_debs(scratch / "apt"):
        _run(["dpkg-deb", "--extract", str(deb), str(root)], "unpacking a Debian package")
    if not (root / "lib").exists():  # since Debian 13 the packages contain only usr/lib
        (root / "lib").symlink_to("usr/lib")
    on_status(f"downloading {len(pins)} aarch64 wheels with pip (42 MB)")
    for wheel in _fetch_wheels(scratch / "wheels", pins, _python_of(root), _glibc_of(root)):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _fetch_debs(apt: Path) -> list[Path]:
    """Download `DEBS` and all their dependencies: apt sees no installed package."""
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
    # Ignore a failing third-party source: if a package is missing, the next step fails.
    subprocess.run([*command, "update"], capture_output=True, timeout=FETCH_TIMEOUT_S, check=False)
    _run(
        [*command, "-y", "--no-install-recommends", "--download-only", "install", *DEBS],
        "downloading arm64 packages with apt (check the network and Debian's mirror)",
    )
    return sorted((apt / "cache/archives").glob("*.deb"))


def _fetch_wheels(target: Path, pins: Sequence[str], python: str, glibc: int) -> list[Path]:
    """Download the aarch64 wheels for that Python and glibc 2.x."""
    # A wheel for an older manylinux runs on a newer glibc, but pip needs every accepted tag.
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(17, glibc + 1)] + ["manylinux2014_aarch64"]
    abis = [f"cp{python.replace('.', '')}", "abi3", "none"]
    options = ["--only-binary=:all:", "--no-deps", "--python-version", python, "--implementation", "cp"]
    options += [word for tag in platforms for word in ("--platform", tag)]
    options += [word for tag in abis for word in ("--abi", tag)]
    _run(
        [sys.executable, "-I", "-m", "pip", "download", "-q", *options, "-d", str(target), *pins],
        "downloading aarch64 wheels with pip (check the network and the package index)",
    )
    return sorted(target.glob("*.whl"))


def _run(command: Sequence[str], what: str) -> None:
    """Run a tool. Raises `DeviceError` with the first error line of the tool if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{what} took longer than {FETCH_TIMEOUT_S} s") from error
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if re.match(r"(E:|ERROR:|dpkg)", line)]
        reason = (reasons or done.stderr.splitlines() or [f"exit status {done.returncode}"])[0]
        raise DeviceError(f"{what} failed: {reason}")


def _rename_into_place(made: Path, folder: Path) -> None:
    """Move the finished root into place; if another run was faster, use its root."""
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
            "the emulated board consists of Debian packages: run this on Debian 12 or later, or in a "
            f"container of it; found {release.get('PRETTY_NAME', platform.system())}"
        )
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]:
        raise DeviceError(f"the emulated board consists of Debian packages, but {' and '.join(missing)} is missing")
    return release["VERSION_CODENAME"]


def _python_of(root: Path) -> str:
    """Return the version of the root's Python, such as "3.11"."""
    return (root / "usr/bin/python3").readlink().name.removeprefix("python")


def _glibc_of(root: Path) -> int:
    """Return x of the root's glibc 2.x."""
    library = (root / "lib/aarch64-linux-gnu/libc.so.6").read_bytes()
    found = re.search(rb"GNU C Library .*? version 2\.(\d+)", library)
    if found is None:
        raise DeviceError(f"cannot read the version of the C library in {root}")
    return int(found[1])
