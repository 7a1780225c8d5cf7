"""Creates a service from its settings: opens the bundles and starts a worker for each."""

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

ONLINE_TIMEOUT_S: Final = 60.0


@contextmanager
def open_service(config: ServeConfig, on_online: Callable[[], None] | None = None) -> Iterator[Service]:
    """Yield a service for the bundles in the settings; the workers are closed when the block ends.

    Each model has its own engine. If there are several, their threads sleep instead of spinning while they wait, so
    that requests of different models can run at the same time.

    Raises
    ------
    EdgelmError
        If a bundle, a certificate or the password file cannot be used.
    """
    with ExitStack() as stack:
        models: list[ServedModel] = []
        left_mb = config.memory_limit_mb
        for path in config.models:
            engine = Engine.open(path, make_engine_options(config, left_mb))
            worker = Worker(engine, queue_size=config.queue)
            model = make_served_model(engine.bundle, path, engine.context, worker)
            if any(model.name == other.name for other in models):
                raise EdgelmError(f"two models are called {model.name}: model names must differ")
            models.append(model)
            if model.sampling.temperature > 0:
                load_kernels()  # otherwise the first request would wait seconds for the compilation
            else:
                ensure_compiled()  # a request may set a temperature
            if left_mb is not None:
                left_mb -= (engine.memory.total - engine.memory.program) // 1_000_000
            worker.start()
            stack.callback(worker.close)
        yield Service(config, models, on_online)


def make_engine_options(config: ServeConfig, memory_limit_mb: int | None) -> EngineOptions:
    """Return the loading options of a bundle; `memory_limit_mb` is the memory that the models before it left."""
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
    """Serve on a thread of this process while the block runs; the block starts when the board is online.

    When the block ends, running requests are cancelled.

    Raises
    ------
    EdgelmError
        If the board is not online within `ONLINE_TIMEOUT_S`.
    """
    online = threading.Event()
    failures: list[BaseException] = []
    with open_service(config, online.set) as service:

        def serve() -> None:
            try:
                service.run()
            except BaseException as error:  # noqa: BLE001  raised again below
                failures.append(error)
                online.set()

        thread = threading.Thread(target=serve, name="edgelm-service", daemon=True)
        thread.start()
        try:
            if not online.wait(ONLINE_TIMEOUT_S) or failures:
                raise EdgelmError(f"the board did not come online: {failures[0] if failures else 'no connection'}")
            yield
        finally:
            service.stop()
            service.stop()  # the second call cancels running requests
            thread.join(ONLINE_TIMEOUT_S)


def make_served_model(bundle: Bundle, path: str, context: int, worker: Worker) -> ServedModel:
    """Return the served model of a bundle. It holds the folder's name but not its path, which clients must not see."""
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
