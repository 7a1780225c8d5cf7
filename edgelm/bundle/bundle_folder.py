"""A bundle on disk: opens it, verifies its files against the manifest, and seals a new one. Knows nothing of ONNX.

A bundle is a directory with `manifest.json`, an ONNX graph with its weights, and `tokenizer.json`. The manifest lists
every other file with its size and SHA-256.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgelm.bundle.manifest import MANIFEST, TOKENIZER, BundleFile, Manifest, dump_manifest
from edgelm.bundle.manifest_parser import parse_manifest
from edgelm.bundle.store import BUILTIN_FOLDER, missing_bundle_error, resolve_bundle_path
from edgelm.errors import BundleError
from edgelm.system.digest import file_sha256

MAX_MANIFEST_BYTES: Final = 16_000_000


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose manifest was read."""

    path: Path
    manifest: Manifest

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.path / self.manifest.graph

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json of the Hugging Face tokenizers library."""
        return self.path / TOKENIZER

    @property
    def bytes(self) -> int:
        """Size of all files on disk, without the manifest."""
        return sum(file.bytes for file in self.manifest.files.values())

    @property
    def is_builtin(self) -> bool:
        """Whether this is the bundle inside the package, whose files are trusted as the package's code is."""
        return self.path.resolve() == BUILTIN_FOLDER.resolve()

    def verify(self, known: Collection[str] = ()) -> None:
        """Raise `BundleError` unless every file has the manifest's size and hash; files in `known` are not hashed."""
        _verify(self.path, self.manifest, frozenset(known))


def open_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """Open the bundle at `path`, or a bundle by its name (`edgelm list`); `"builtin"` is the one inside the package.

    With `verify` every file's size and SHA-256 is checked. Raises `BundleError` if the directory is missing or not a
    bundle, its schema is newer, a file is missing or a hash is wrong.
    """
    root = resolve_bundle_path(path)
    if not root.is_dir():
        raise missing_bundle_error(str(path))
    try:
        text = _read_bounded(root / MANIFEST)
    except FileNotFoundError:
        raise BundleError(f"{root} has no {MANIFEST}: it is not a bundle; `edgelm export` makes one") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{root / MANIFEST} cannot be read: {error}") from error
    bundle = Bundle(root, parse_manifest(text, str(root / MANIFEST)))
    if verify:
        bundle.verify()
    return bundle


def write_manifest(root: Path, manifest: Manifest) -> Manifest:
    """Hash every file in `root`, write the manifest there, and return it with the hashes."""
    names = sorted(file.name for file in root.iterdir() if file.name != MANIFEST)
    files = {name: BundleFile((root / name).stat().st_size, file_sha256(root / name)) for name in names}
    sealed = dataclasses.replace(manifest, files=files)
    (root / MANIFEST).write_text(dump_manifest(sealed), encoding="utf-8")
    return sealed


def _read_bounded(file: Path) -> str:
    """Return a text file's content. Raises `OSError`, and `ValueError` if it is too large or not UTF-8."""
    if not stat.S_ISREG(file.stat().st_mode):  # reading a named pipe from an archive would block forever
        raise ValueError("it is not a regular file")
    with file.open("rb") as stream:
        content = stream.read(MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has more than {MAX_MANIFEST_BYTES} bytes")
    return content.decode("utf-8")


def _verify(root: Path, manifest: Manifest, known: frozenset[str]) -> None:
    if manifest.prefix is not None and manifest.prefix.weights != manifest.weights_digest:
        raise BundleError(
            f"{root / manifest.prefix.file}: the static prefix was computed with other weights than {manifest.graph};"
            f" compute it again with `edgelm prefix {root} FILE`, or remove it with `edgelm prefix {root} --remove`"
        )
    for required in (manifest.graph, TOKENIZER):
        if required not in manifest.files:
            raise BundleError(f"{root / MANIFEST} is damaged: it does not list {required}")
    for name, expected in manifest.files.items():
        file = root / name
        if file.is_symlink() and not _stays_within(root, file):
            raise BundleError(f"{file} is a link that leads out of the bundle: replace it with a copy of the file")
        if not file.is_file():
            raise BundleError(f"{root} is incomplete: {name} is missing; export or copy the bundle again")
        size = file.stat().st_size
        if size != expected.bytes:
            raise BundleError(f"{file} is damaged: it has {size} bytes, the manifest lists {expected.bytes}")
        if name not in known and file_sha256(file) != expected.sha256:
            raise BundleError(f"{file} is damaged: its SHA-256 is not the manifest's; export or copy it again")


def _stays_within(root: Path, link: Path) -> bool:
    try:
        return root.resolve() in link.resolve(strict=True).parents
    except (OSError, RuntimeError):  # a broken or circular link
        return False
