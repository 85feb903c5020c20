"""Who works when: the same tasks on Ray (`cluster`) or in this process, with the same rules about failures.

A task is done when its shard is there, never because somebody said so. Retries belong to the driver: a lost
worker gives its task back at once and is replaced; a task that fails `attempts` times is set aside with its
traceback, and the run goes on.
"""

import contextlib
import dataclasses
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from pipeline.config.schema import EngineConfig
from pipeline.core.errors import AtlasError
from pipeline.engine.progress import WorkerStats
from pipeline.engine.tasks import Done, Setup, Task
from pipeline.engine.worker import Worker

log = logging.getLogger(__name__)

# A worker may be lost through no fault of its task; so many losses count as one failure of the task.
LOSSES_A_FAILURE = 3


@dataclasses.dataclass(frozen=True)
class Failure:
    """A task that was set aside, and why."""

    task: Task
    reason: str
    detail: str


class TooManyFailures(Exception):
    """So many tasks failed in a row that going on would be a waste."""


@dataclasses.dataclass(frozen=True)
class WorkerPool:
    """How many workers, with how much of a node each."""

    workers: int
    cpus: float
    gpus: float
    device: str

    @property
    def threads(self) -> int:
        """CPU threads of one worker."""
        return max(1, int(self.cpus))

    def room(self, nodes: Sequence[tuple[float, float]]) -> int:
        """How many such workers fit on nodes of (CPUs, GPUs); none spans two nodes."""
        fits = (min(c // self.cpus, g // self.gpus if self.gpus else float("inf")) for c, g in nodes)
        return int(sum(fits))


OnResult = Callable[[Task, Done | Failure], None]


class Engine(Protocol):
    """Does tasks with a crew, and remembers who worked when."""

    pool: WorkerPool
    posts: list[WorkerStats]

    def execute(self, tasks: Sequence[Task], setup: Setup, finished: OnResult, idle: Callable[[], None]) -> None:
        """Do `tasks` in the order of `ordered` and tell `finished` of each; `idle` is called every second or so.

        Raises `TooManyFailures` after `max_failures` set aside in a row. On KeyboardInterrupt the workers are
        stopped and the exception goes on; finished shards stay.
        """
        ...


def size_pool(config: EngineConfig, nodes: Sequence[tuple[float, float]], tasks: int | None = None) -> WorkerPool:
    """Fill the `auto` fields for machines of (CPUs, GPUs) each.

    Where there are GPUs, one worker each, sharing their node's cores, and nodes without one rest: a core is so
    much slower that its last task would be waited for. Without GPUs one worker a core, which two cores were
    measured to finish more pictures with than with one worker of two threads. Never more workers than tasks.
    """
    device = config.device
    gpus = sum(g for _, g in nodes)
    if device == "auto":
        device = "cuda" if gpus > 0 and config.gpus_per_worker != 0 else "cpu"
    per_gpu = config.gpus_per_worker
    if isinstance(per_gpu, str):
        per_gpu = 1.0 if device.startswith("cuda") else 0.0
    per_cpu = config.cpus_per_worker
    if config.name == "inline":
        return WorkerPool(1, sum(c for c, _ in nodes) if isinstance(per_cpu, str) else per_cpu, per_gpu, device)
    if isinstance(per_cpu, str):
        if per_gpu:
            # The node with the fewest cores for each of its GPUs decides, so that no GPU is left without a worker.
            shares = [c // (g // per_gpu) for c, g in nodes if g >= per_gpu]
            per_cpu = max(1.0, min(shares, default=1.0))
        elif isinstance(config.workers, int):
            per_cpu = max(1.0, sum(c for c, _ in nodes) // config.workers)
            if len(nodes) > 1:
                per_cpu = min(per_cpu, max(c for c, _ in nodes) or 1.0)
        else:
            per_cpu = 1.0
    made = WorkerPool(1, per_cpu, per_gpu, device)
    workers = config.workers if isinstance(config.workers, int) else max(1, made.room(nodes))
    return dataclasses.replace(made, workers=max(1, workers if tasks is None else min(workers, tasks)))


def ordered(tasks: Sequence[Task]) -> list[Task]:
    """Stage by stage, and the longest first, so that what is left at the end is short."""
    stages = list(dict.fromkeys(task.stage for task in tasks))
    return sorted(tasks, key=lambda t: (stages.index(t.stage), -t.cost))


@contextlib.contextmanager
def opened(config: EngineConfig, kind: type = Worker) -> Iterator[Engine]:
    """The engine that `config` names, left in order on exit; `kind` is the class of its workers."""
    if config.name == "inline":
        yield Inline(config, kind)
        return
    from pipeline.engine.ray_engine import OnRay, connected

    with connected(config) as ray:
        yield OnRay(ray, config, kind)


class FailureTracker:
    """Counts failures: which task may be tried again, and when to give up altogether."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.counts: dict[str, float] = {}
        self.in_a_row = 0

    def failed(self, task: Task, reason: str, detail: str, weight: float = 1.0) -> Failure | None:
        """None if the task may be tried again."""
        count = self.counts[task.path] = self.counts.get(task.path, 0.0) + weight
        log.warning("%s failed (%.2g of %d): %s", task.name, count, self.config.attempts, reason)
        if count < self.config.attempts - 1e-6:
            return None
        self.in_a_row += 1
        return Failure(task, reason, detail)

    def check(self) -> None:
        """Raise `TooManyFailures` if the last tasks were all set aside."""
        if self.in_a_row >= self.config.max_failures:
            raise TooManyFailures(
                f"{self.in_a_row} tasks in a row were set aside; the last reasons are in failures.csv. "
                "Everything finished is kept: mend the cause and run again."
            )


class Inline:
    """All tasks in this process, one after the other, without Ray."""

    def __init__(self, config: EngineConfig, kind: type = Worker) -> None:
        self.config, self.kind = config, kind
        self.pool = size_pool(config, [local_resources()])
        self.posts: list[WorkerStats] = []

    def execute(self, tasks: Sequence[Task], setup: Setup, finished: OnResult, idle: Callable[[], None]) -> None:
        """See `Engine.execute`."""
        worker: Any = self.kind(setup, stop=idle)
        post = WorkerStats(f"inline:{os.getpid()}", time.monotonic())
        self.posts.append(post)
        tries = FailureTracker(self.config)
        try:
            for task in ordered(tasks):
                result = self._one(worker, task, tries)
                if isinstance(result, Done):
                    tries.in_a_row = 0
                    post.busy, post.tasks = post.busy + result.seconds, post.tasks + 1
                finished(task, result)
                tries.check()
        finally:
            post.left = time.monotonic()

    def _one(self, worker: Any, task: Task, tries: FailureTracker) -> Done | Failure:
        while True:
            try:
                return worker.do(task)
            except AtlasError:
                raise
            except Exception as error:
                failure = tries.failed(task, f"{type(error).__name__}: {error}", traceback.format_exc())
                if failure is not None:
                    return failure


def local_resources() -> tuple[int, int]:
    """(CPU cores this process may use, GPUs) of this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cpus, torch.cuda.device_count() if torch.cuda.is_available() else 0
