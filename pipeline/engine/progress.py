"""How far a run is: live bars on a terminal, a plain line every few seconds elsewhere."""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.progress import Task as BarTask
from rich.text import Text


def clock(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 7 min 03 s, 3 h 20 min."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 6000:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


@dataclasses.dataclass
class WorkerStats:
    """A worker's time at work: seconds on the driver's clock, of which `busy` were spent on `tasks` finished."""

    name: str
    joined: float
    left: float | None = None
    busy: float = 0.0
    tasks: int = 0
    end: str = ""

    def use(self, now: float) -> float:
        """Share of its time that it was at work; loading the network is no work."""
        return min(1.0, self.busy / max((self.left or now) - self.joined, 1e-6))


@dataclasses.dataclass
class Stage:
    """Counts of one stage; `done` includes what an earlier run had finished, `fresh` does not.

    `cost` is the estimate of the work to do, in seconds of one worker, and `spent` the share of it that is
    behind; `measured` of that was done (not set aside) and took `seconds`.
    """

    name: str
    noun: str
    total: int
    done: int
    cost: float = 0.0
    fresh: int = 0
    failed: int = 0
    began: float | None = None
    ended: float | None = None
    spent: float = 0.0
    measured: float = 0.0
    seconds: float = 0.0

    @property
    def left(self) -> float:
        """Worker seconds of the work left: the estimate, corrected by what finished tasks really took."""
        return max(self.cost - self.spent, 0.0) * (self.seconds / self.measured if self.measured > 0 else 1.0)

    def rate(self, now: float) -> float:
        """Units per second since the stage's first task began."""
        if self.began is None:
            return 0.0
        return self.fresh / max((now if self.ended is None else self.ended) - self.began, 1e-6)

    def line(self, now: float) -> str:
        """`render 36 of 108 units, 0.52/s, 2 failed`."""
        parts = [f"{self.name} {self.done} of {self.total} {self.noun}"]
        if self.fresh and self.done < self.total:
            parts.append(f"{self.rate(now):.2g}/s")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts)


class _Note(ProgressColumn):
    """What stands right of a bar."""

    def render(self, task: BarTask) -> Text:
        """The note that `ProgressReporter` keeps."""
        return Text(task.fields.get("note", ""))


class ProgressReporter:
    """Progress of all stages that work together; a context manager.

    The ETA goes by estimated cost, not by number, for late layers take longer, and counts on `workers` being
    busy all the time. `saved` is told every second or so what status.json should hold. `after` is the number of
    seconds that come after the stages.
    """

    def __init__(
        self,
        stages: list[Stage],
        workers: int,
        saved: Callable[..., None],
        every: float,
        posts: Sequence[WorkerStats] = (),
        after: float = 0.0,
    ) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.most, self.posts = workers, posts
        self.every, self.saved, self.after = every, saved, after
        self.added = time.monotonic()
        self.spoken = self.kept = float("-inf")
        self.console = Console(stderr=True)
        self.bars: Progress | None = None
        self.rows: dict[str, Any] = {}

    def __enter__(self) -> "ProgressReporter":
        if self.console.is_terminal:
            self.bars = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Note(),
                console=self.console,
            )  # fmt: skip
            self.bars.start()
            for stage in self.stages.values():
                self.rows[stage.name] = self.bars.add_task(stage.name, total=stage.total, completed=stage.done)
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        self._show(final=True)
        if self.bars is not None:
            self.bars.stop()

    def add(self, stage: str, units: int, cost: float, seconds: float, failed: bool = False) -> None:
        """Count a finished task that took `seconds`."""
        own = self.stages[stage]
        if own.began is None:
            own.began = time.monotonic() - seconds
        if failed:
            own.failed += units
        else:
            own.done += units
            own.fresh += units
            own.seconds += seconds
            own.measured += cost
        own.spent += cost
        self.added = time.monotonic()
        if own.done + own.failed >= own.total:
            own.ended = self.added
        self.beat()

    def beat(self) -> None:
        """Called often; speaks only every few seconds."""
        self._show(final=False)

    @property
    def workers(self) -> int:
        """How many are at work now; before anybody has come, how many are expected."""
        return sum(post.left is None for post in self.posts) or self.most

    @property
    def eta(self) -> float | None:
        """Seconds left; None before anything was finished and so measured, and while the work takes longer than that.

        A task in progress reports nothing, so an estimate that has run out says nothing about the rest.
        """
        if not any(stage.fresh for stage in self.stages.values()):
            return None
        left = sum(stage.left for stage in self.stages.values()) / self.workers
        waited = time.monotonic() - self.added
        if left > 0 and waited >= left:
            return None
        return max(left - waited, 0.0) + self.after

    def _show(self, final: bool) -> None:
        now = time.monotonic()
        left = None if final else self.eta
        if self.bars is not None:
            for stage in self.stages.values():
                note = f"{stage.rate(now):.2g} {stage.noun}/s" if stage.fresh else ""
                if left is not None and stage.done < stage.total:
                    note += f"  {clock(left)} left"
                self.bars.update(self.rows[stage.name], completed=stage.done, note=note)
        elif final or now - self.spoken >= self.every:
            lines = [stage.line(now) for stage in self.stages.values()]
            if left is not None:
                lines.append(f"{clock(left)} left")
            sys.stderr.write("; ".join(lines) + "\n")
            sys.stderr.flush()
            self.spoken = now
        if final or now - self.kept >= 1.0:
            self.saved(
                stages={
                    s.name: {"done": s.done, "total": s.total, "failed": s.failed, "per_second": round(s.rate(now), 3)}
                    for s in self.stages.values()
                },
                eta_seconds=None if left is None else round(left, 1),
                workers=self.workers,
            )
            self.kept = now


def report(stages: Sequence[Stage], posts: Sequence[WorkerStats], seconds: float, failures: int) -> dict[str, Any]:
    """What a run did, as plain data: units, failures, seconds and rate by stage, and how busy each worker was."""
    now = time.monotonic()
    return {
        "seconds": round(seconds, 1),
        "failures": failures,
        "stages": {
            s.name: {
                s.noun: s.fresh,
                "failed": s.failed,
                "seconds": round((s.ended or now) - s.began, 1) if s.began is not None else 0.0,
                "worker_seconds": round(s.seconds, 1),
                "per_second": round(s.rate(now), 3),
            }
            for s in stages
        },
        "workers": [
            {
                "name": post.name,
                "tasks": post.tasks,
                "seconds": round((post.left or now) - post.joined, 1),
                "busy": round(post.busy, 1),
                "use": round(post.use(now), 3),
                **({"end": post.end} if post.end else {}),
            }
            for post in posts
        ],
    }


def told(summary: dict[str, Any], most: int = 8) -> list[str]:
    """A report in a few lines; of many workers only the least busy are named."""
    lines = []
    for name, stage in summary["stages"].items():
        noun, count = next(iter(stage.items()))
        if count:
            lines.append(f"{name}: {count:,} {noun} in {clock(stage['seconds'])}, {stage['per_second']:.3g}/s")
    workers = summary["workers"]
    whole = sum(w["seconds"] for w in workers)
    if whole:
        use = sum(w["busy"] for w in workers) / whole
        lines.append(f"{len(workers)} workers, busy {use:.0%} of their time")
        for w in sorted(workers, key=lambda w: w["use"])[:most]:
            end = f"; {w['end']}" if "end" in w else ""
            lines.append(f"  {w['name']}: {w['tasks']} tasks, {w['use']:.0%} of {clock(w['seconds'])}{end}")
        if len(workers) > most:
            lines.append(f"  … and {len(workers) - most} busier ones")
    return lines
