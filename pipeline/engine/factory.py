"""Choice of the engine by name."""

import contextlib
from collections.abc import Iterator

from pipeline.config.schema import EngineConfig
from pipeline.engine.base import Engine
from pipeline.engine.inline import InlineEngine
from pipeline.engine.worker import Worker


@contextlib.contextmanager
def open_engine(config: EngineConfig, worker_class: type = Worker) -> Iterator[Engine]:
    """Yield the engine that `config.name` names; its workers are stopped on exit.

    Args:
        config: Settings of the engine.
        worker_class: Class of the workers.
    """
    if config.name == "inline":
        engine = InlineEngine(config, worker_class)
        try:
            yield engine
        finally:
            engine.close()
        return
    # Ray takes seconds to import, and inline runs do without it.
    from pipeline.engine.connection import connected
    from pipeline.engine.ray_engine import RayEngine

    with connected(config) as ray:
        engine = RayEngine(ray, config, worker_class)
        try:
            yield engine
        finally:
            engine.close()
