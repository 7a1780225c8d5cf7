"""From settings to a service that is ready to run: the bundle opened, the engine on its thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgelm.bundle import BUILTIN, Bundle, open_bundle
from edgelm.config import ServeConfig
from edgelm.engine import Engine
from edgelm.mqtt.desk import ServedModel
from edgelm.mqtt.service import Service
from edgelm.worker import Worker


@contextmanager
def open_board(config: ServeConfig, on_online: Callable[[], None] | None = None) -> Iterator[Service]:
    """Yield a service for the settings' bundle; its engine stops when the block ends.

    Raises
    ------
    EdgelmError
        When the bundle, a certificate or the password file cannot be used.
    """
    bundle = open_bundle(config.model)
    engine = Engine(bundle, threads=config.threads, context=config.context, max_batch=config.max_batch)
    worker = Worker(engine, queue_size=config.queue)
    service = Service(config, worker, describe(bundle, config.model, engine.context), on_online)
    worker.start()
    try:
        yield service
    finally:
        worker.close()


def describe(bundle: Bundle, path: str, context: int) -> ServedModel:
    """Return what clients may know of a bundle: the folder's name, not where it lies."""
    manifest = bundle.manifest
    return ServedModel(
        name=BUILTIN if path == BUILTIN else Path(path).resolve().name,
        digest=manifest.digest,
        sampling=manifest.sampling,
        details={
            "architecture": manifest.architecture,
            "quant": manifest.quant,
            "parameters": manifest.parameters,
            "context": context,
            "chat": manifest.chat_template is not None,
        },
    )
