"""From settings to a service that is ready to run: the bundle opened, the engine on its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from edgelm.bundle.bundle_folder import Bundle
from edgelm.bundle.store import BUILTIN
from edgelm.engine.engine import Engine
from edgelm.engine.engine_options import EngineOptions
from edgelm.engine.worker import Worker
from edgelm.errors import EdgelmError
from edgelm.mqtt.request_handler import ServedModel
from edgelm.mqtt.service import Service
from edgelm.mqtt.service_config import ServeConfig
from edgelm.sampling import ensure_compiled, load_kernels
from edgelm.system.board_cache import BoardCache

START_WITHIN_S: Final = 60.0


@contextmanager
def open_service(config: ServeConfig, on_online: Callable[[], None] | None = None) -> Iterator[Service]:
    """Yield a service for the settings' bundles; their engines stop when the block ends.

    Several models have an engine each, whose threads sleep when they wait: requests for both run beside each other.

    Raises
    ------
    EdgelmError
        When a bundle, a certificate or the password file cannot be used.
    """
    with ExitStack() as stack:
        models: list[ServedModel] = []
        left_mb = config.memory_limit_mb
        for path in config.models:
            engine = Engine.open(path, make_engine_options(config, left_mb))
            worker = Worker(engine, queue_size=config.queue)
            model = make_served_model(engine.bundle, path, engine.context, worker)
            if any(model.name == other.name for other in models):
                raise EdgelmError(f"two models are called {model.name}: requests could not tell them apart")
            models.append(model)
            if engine.bundle.manifest.sampling.temperature > 0:
                load_kernels()  # compiling takes seconds, which the first request would wait for
            else:
                ensure_compiled()  # a request may have a temperature of its own
            if left_mb is not None:
                left_mb -= (engine.memory.total - engine.memory.program) // 1_000_000
            worker.start()
            stack.callback(worker.close)
        yield Service(config, models, on_online)


def make_engine_options(config: ServeConfig, memory_limit_mb: int | None) -> EngineOptions:
    """Return how each bundle is loaded; `memory_limit_mb` is what the models before it left."""
    return EngineOptions(
        threads=config.threads,
        context=config.context,
        max_batch=config.max_batch,
        prefix_cache_mb=config.prefix_cache_mb,
        speculation=config.speculation,
        board_cache=BoardCache.default() if config.cache else None,
        memory_limit_mb=memory_limit_mb,
        spin=None if len(config.models) == 1 else False,
        client_limits=config.client_limits,
    )


@contextmanager
def serve_in_background(config: ServeConfig) -> Iterator[None]:
    """Serve on a thread of this process while the block runs, which begins when the board is online.

    Raises
    ------
    EdgelmError
        When the board does not come online; what was under way when the block ends is not waited for.
    """
    online = threading.Event()
    failures: list[BaseException] = []
    with open_service(config, online.set) as service:

        def serve() -> None:
            try:
                service.run()
            except BaseException as error:  # noqa: BLE001  told to whoever waits below
                failures.append(error)
                online.set()

        thread = threading.Thread(target=serve, name="edgelm-service", daemon=True)
        thread.start()
        try:
            if not online.wait(START_WITHIN_S) or failures:
                raise EdgelmError(f"the board did not come online: {failures[0] if failures else 'no connection'}")
            yield
        finally:
            service.stop()
            service.stop()  # whatever runs is not waited for
            thread.join(START_WITHIN_S)


def make_served_model(bundle: Bundle, path: str, context: int, worker: Worker) -> ServedModel:
    """Return what clients may know of a bundle: the folder's name, not where it lies."""
    manifest = bundle.manifest
    return ServedModel(
        name=BUILTIN if path == BUILTIN else Path(path).resolve().name,
        digest=manifest.digest,
        sampling=manifest.sampling,
        worker=worker,
        details={
            "architecture": manifest.architecture,
            "quant": manifest.quant,
            "parameters": manifest.parameters,
            "context": context,
            "chat": manifest.chat_template is not None,
        },
    )
