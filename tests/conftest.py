"""Fixtures that every test may use: the shared data, checkpoints, and bundles exported from them once a run.

Runtime tests take their bundle from `bundle`, so that they also run where nothing can be exported: it is the tiny
exported one, or that of EDGELM_TEST_BUNDLE, or the built-in one.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from real_model import smollm2
from shared_data import REPO, can_export, shared_folder
from tiny import TinyLlama

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.bundle.manifest import MANIFEST
from edgelm.cli import main

if TYPE_CHECKING:
    from edgelm.engine.worker import Worker

# Machines are shared and slow at times, so nothing is timed; a failing example is printed, not stored.
settings.register_profile("edgelm", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("few", settings.get_profile("edgelm"), max_examples=20)
settings.load_profile("edgelm")

# A shell's background job is started deaf to Ctrl-C, and so would be every program that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_data(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's own bundles out of the tests, and the tests' out of theirs."""
    monkeypatch.setenv("EDGELM_DATA_DIR", str(tmp_path_factory.getbasetemp() / "no-data"))


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data and models that the repository does not carry."""
    path = shared_folder()
    if path is None:
        pytest.skip("needs data that the repository does not carry (tests/README.md): set EDGELM_SHARED to its folder")
    return path


@pytest.fixture(scope="session")
def stories_checkpoint(shared: Path) -> Path:
    """A real pretrained Llama of 260 thousand parameters."""
    path = shared / "models" / "stories260K"
    if not (path / "config.json").is_file():
        pytest.skip(f"{path} is absent: set EDGELM_SHARED to a folder that has models/stories260K")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """A real model that people use, SmolLM2-135M-Instruct in Q4_1; see `real_model`."""
    found = smollm2()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def export_to_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export a checkpoint with options, by default without calibration; the same call gives the same bundle again.

    Treat it as read-only.
    """
    if not can_export():
        pytest.skip("exporting needs pip install 'edgelm[export]'")
    import edgelm_export

    made: dict[tuple[object, ...], Path] = {}

    def export(checkpoint: Path, **options: object) -> Path:
        if not {"calibrate", "method", "via"} & set(options):
            options = {"fast": True, **options}
        key = (checkpoint, *sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("bundle") / "out"
            edgelm_export.export(checkpoint, out, **options)
            made[key] = out
        return made[key]

    return export


@pytest.fixture(scope="session")
def stories_bundle(stories_checkpoint: Path, export_to_cache: Callable[..., Path]) -> Callable[[str], Path]:
    """Precision -> the bundle of stories260K."""
    return lambda quant: export_to_cache(stories_checkpoint, quant=quant)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Fields of `TinyLlama` -> a checkpoint of that shape with random weights. Treat it as read-only."""
    if not can_export():
        pytest.skip("writing checkpoints needs pip install 'edgelm[export]'")
    made: dict[TinyLlama, Path] = {}

    def write(**fields: object) -> Path:
        shape = TinyLlama(**fields)  # type: ignore[arg-type]
        if shape not in made:
            made[shape] = shape.write(tmp_path_factory.mktemp("checkpoint") / "model")
        return made[shape]

    return write


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """For references of tiny models, which more threads only slow down."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Path:
    """The bundle that runtime tests run, float32 where it was exported here."""
    given = os.environ.get("EDGELM_TEST_BUNDLE")
    if given:
        return Path(given)
    if can_export():
        checkpoint = request.getfixturevalue("tiny_checkpoint")(tied=False)  # a tied one would repeat itself
        return request.getfixturevalue("export_to_cache")(checkpoint, quant="fp32")
    builtin = Path(edgelm.__file__).parent / "builtin"
    if not (builtin / MANIFEST).is_file():
        pytest.skip("no bundle to run: pip install 'edgelm[export]', or name one in EDGELM_TEST_BUNDLE")
    return builtin


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A copy of `bundle`'s own files, to be changed, without anything that lies beside them."""
    root = tmp_path / "bundle"
    root.mkdir()
    for name in (*open_bundle(bundle, verify=False).manifest.files, MANIFEST):
        shutil.copy(bundle / name, root / name)
    return root


@pytest.fixture(scope="session")
def float32_bundle(bundle: Path) -> Path:
    """`bundle`, where its numbers are those of any batch size; quantized activations amplify rounding."""
    if open_bundle(bundle).manifest.quant != "fp32":
        pytest.skip("needs a float32 bundle: pip install 'edgelm[export]', or name one in EDGELM_TEST_BUNDLE")
    return bundle


@pytest.fixture(scope="session")
def model(bundle: Path) -> Iterator[edgelm.Model]:
    """`bundle`, loaded; tests that stop or break it load their own."""
    with edgelm.load(bundle, threads=1, max_batch=4) as loaded:
        yield loaded


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; return its code, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def start_worker(bundle: Path) -> Iterator[Callable[..., Worker]]:
    """Start a worker of a fresh engine; closed after the test."""
    from edgelm.engine.engine import Engine
    from edgelm.engine.engine_options import EngineOptions
    from edgelm.engine.worker import Worker

    workers: list[Worker] = []

    def begin(max_batch: int = 1, queue_size: int = 8) -> Worker:
        worker = Worker(Engine(open_bundle(bundle), EngineOptions(threads=1, max_batch=max_batch)), queue_size)
        worker.start()
        workers.append(worker)
        return worker

    yield begin
    for worker in workers:
        worker.close(60)
        assert not worker._thread.is_alive()
