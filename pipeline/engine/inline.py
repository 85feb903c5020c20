"""The engine that executes all tasks in this process, one after the other, without Ray."""

import dataclasses
import os
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.config.schema import EngineConfig
from pipeline.core.errors import AtlasError, TryAgainError, first_line
from pipeline.engine.base import Failure, FailureTracker, OnResult, ordered
from pipeline.engine.batch_sizes import BatchSizes
from pipeline.engine.progress import WorkerStats
from pipeline.engine.resources import local_resources, size_pool
from pipeline.engine.tasks import Done, Setup, Task, write_result
from pipeline.engine.worker import DeviceLost, Worker


class InlineEngine:
    """See `engine.base.Engine`."""

    def __init__(self, config: EngineConfig, worker_class: type = Worker) -> None:
        self.config, self.worker_class = config, worker_class
        self.pool = size_pool(config, [local_resources()])
        self.stats: list[WorkerStats] = []
        self._batches = BatchSizes()
        self._worker: Any = None
        self._setup: Setup | None = None

    def await_nodes(self, on_idle: Callable[[], None]) -> None:
        """Return at once: this process is the worker."""

    def execute(self, tasks: Sequence[Task], setup: Setup, on_result: OnResult, on_idle: Callable[[], None]) -> None:
        """See `engine.base.Engine.execute`."""
        if self._worker is None or self._setup is not setup:
            self.close()
            self._worker, self._setup = self.worker_class(setup), setup
            self.stats.append(WorkerStats(f"inline:{os.getpid()}", time.monotonic()))
        self._worker.stop = on_idle
        stats, tracker = self.stats[-1], FailureTracker(self.config)
        for task in ordered(tasks):
            result = self._repeated(task, tracker)
            if isinstance(result, Done):
                tracker.succeeded()
                stats.add(result.seconds)
            on_result(task, result)
            tracker.check()

    def close(self) -> None:
        """See `engine.base.Engine.close`."""
        if self._worker is not None:
            self.stats[-1].left = time.monotonic()
            self._worker = self._setup = None

    def _repeated(self, task: Task, tracker: FailureTracker) -> Done | Failure:
        """Execute one task until it succeeds or is set aside.

        Raises:
            TryAgainError: If this process has lost its GPU: a new process is needed.
        """
        while True:
            try:
                done = self._worker.do(task, self._batches.of(task))
                self._batches.note(task, done.batch)
                write_result(task, done)
                return dataclasses.replace(done, data=b"")
            except AtlasError:
                raise
            except DeviceLost as error:
                raise TryAgainError(
                    f"The GPU failed: {first_line(error)} Finished work is kept: run the same command again."
                ) from error
            except Exception as error:
                failure = tracker.failed(task, f"{type(error).__name__}: {error}", traceback.format_exc())
                if failure is not None:
                    return failure
