"""The interface of engines, which execute tasks, and their rules about failures.

A task is done when its shard exists. The driver repeats tasks: the task of a lost worker goes back to the queue and
the worker is replaced; a task that fails `engine.attempts` times is set aside with its traceback, and the run
continues. A worker that takes far longer than estimated is replaced, too (`engine.deadlines`), and every loss of a
worker or node counts as a part of a failure, so that every run ends.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from pipeline.config.schema import EngineConfig
from pipeline.engine.progress import WorkerStats
from pipeline.engine.resources import WorkerPool
from pipeline.engine.tasks import Done, Setup, Task

log = logging.getLogger(__name__)

# The loss of a worker may not be the fault of its task: this many losses count as one failure. The loss of a whole
# node (preempted, switched off) rarely is, but a task that takes down each node it runs on must end too.
LOSSES_PER_FAILURE = 3
NODE_LOSSES_PER_FAILURE = 10


@dataclasses.dataclass(frozen=True)
class Failure:
    """A task that was set aside.

    Attributes:
        task: The task.
        reason: The last error, in one line.
        detail: Its traceback.
    """

    task: Task
    reason: str
    detail: str


class TooManyFailures(Exception):
    """`engine.max_failures` tasks in a row were set aside: the run stops."""


OnResult = Callable[[Task, Done | Failure], None]


class Engine(Protocol):
    """Executes tasks; its workers live until `close`.

    Attributes:
        pool: Number and size of the workers.
        stats: Statistics of each worker that has started.
    """

    pool: WorkerPool
    stats: list[WorkerStats]

    def await_nodes(self, on_idle: Callable[[], None]) -> None:
        """Wait until there is room for a worker, and choose device and size of the workers from the nodes there.

        Args:
            on_idle: Called about every second; may raise to interrupt the wait.

        Raises:
            TryAgainError: If there is no room within `engine.patience`.
        """
        ...

    def execute(self, tasks: Sequence[Task], setup: Setup, on_result: OnResult, on_idle: Callable[[], None]) -> None:
        """Execute `tasks` in the order of `ordered`.

        Args:
            tasks: The tasks.
            setup: Everything else that workers need.
            on_result: Function that is called with each finished task and its result.
            on_idle: Called about every second; may raise to interrupt the work. Finished shards stay.

        Raises:
            TooManyFailures: If `engine.max_failures` tasks in a row were set aside.
        """
        ...

    def close(self) -> None:
        """Stop all workers."""
        ...


def ordered(tasks: Sequence[Task]) -> list[Task]:
    """Return `tasks` stage by stage, the longest first, so that the last tasks of a stage are short."""
    stages = list(dict.fromkeys(task.stage for task in tasks))
    return sorted(tasks, key=lambda t: (stages.index(t.stage), -t.cost))


class FailureTracker:
    """Counts failures, to tell which tasks may be repeated and when the run must stop."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.counts: dict[str, float] = {}
        self.consecutive = 0

    def failed(self, task: Task, reason: str, detail: str, weight: float = 1.0) -> Failure | None:
        """Count a failure of `task` and return it if the task is to be set aside, None if it may be repeated.

        Args:
            task: The task.
            reason: The error, in one line.
            detail: Its traceback.
            weight: How much it counts; the loss of a worker counts less than an error of the task.
        """
        count = self.counts[task.path] = self.counts.get(task.path, 0.0) + weight
        log.warning("%s failed (%.2g of %d): %s", task.name, count, self.config.attempts, reason)
        if count < self.config.attempts - 1e-6:
            return None
        self.consecutive += 1
        return Failure(task, reason, detail)

    def succeeded(self) -> None:
        """Note that a task was finished."""
        self.consecutive = 0

    def check(self) -> None:
        """Raise `TooManyFailures` if the last `engine.max_failures` tasks were all set aside."""
        if self.consecutive >= self.config.max_failures:
            raise TooManyFailures(
                f"{self.consecutive} tasks in a row were set aside; failures.csv lists the reasons. "
                "Finished work is kept: remove the cause and run again."
            )
