"""Time limits of tasks: a worker that hangs in a dead mount or in a call of the GPU never answers.

The limit of a task follows from its estimated seconds. Estimates may be wrong by a constant factor, for example if they
were measured on another device, so they are scaled by what finished tasks of the stage took.
"""

import dataclasses

from pipeline.config.schema import EngineConfig
from pipeline.engine.tasks import Task

# Finished tasks of a stage from which on the scale may fall below 1: few tasks may all be of the cheap kind.
ENOUGH = 8


@dataclasses.dataclass
class _Measured:
    """Finished tasks of a stage: their number, and the largest ratio of measured to estimated seconds."""

    count: int = 0
    slowest: float = 0.0


class Deadlines:
    """Computes how many seconds a task may take on a worker.

    Args:
        config: Settings of the engine: `timeout` and `timeout_seconds`.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._measured: dict[str, _Measured] = {}
        self._expired: dict[str, int] = {}

    def finished(self, task: Task, seconds: float) -> None:
        """Note that `task` was finished in `seconds`."""
        self._expired.pop(task.path, None)
        if task.cost > 0:
            measured = self._measured.setdefault(task.stage, _Measured())
            measured.count += 1
            measured.slowest = max(measured.slowest, seconds / task.cost)

    def expired(self, task: Task) -> None:
        """Note that `task` exceeded its limit: the next attempt has twice as long."""
        self._expired[task.path] = self._expired.get(task.path, 0) + 1

    def limit(self, task: Task) -> float:
        """Return the seconds that `task` may take now.

        `timeout` times the estimated seconds, scaled by the largest ratio of measured to estimated seconds of finished
        tasks of the stage, and at least `timeout_seconds`; doubled for each time that the task has exceeded it.
        """
        measured = self._measured.get(task.stage, _Measured())
        scale = measured.slowest if measured.count >= ENOUGH else max(1.0, measured.slowest)
        seconds = max(self.config.timeout_seconds, self.config.timeout * max(task.cost, 0.0) * scale)
        return seconds * 2 ** self._expired.get(task.path, 0)
