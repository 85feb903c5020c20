"""Progress of a run: bars on a terminal, a line of text every few seconds elsewhere, and the report at the end."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.progress import Task as BarTask
from rich.text import Text

from pipeline.core.formatting import clock


@dataclasses.dataclass
class WorkerStats:
    """Statistics of one worker.

    Attributes:
        name: "host:process".
        joined: Time of its start in seconds, on the clock of the driver.
        left: Time of its end; None while it runs.
        busy: Seconds spent on finished tasks.
        tasks: Number of finished tasks.
        end: Why it ended early; empty otherwise.
        versions: Versions of the project and its libraries in its process; empty inline.
    """

    name: str
    joined: float
    left: float | None = None
    busy: float = 0.0
    tasks: int = 0
    end: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def add(self, seconds: float) -> None:
        """Count a finished task that took `seconds`."""
        self.busy += seconds
        self.tasks += 1

    def use(self, now: float) -> float:
        """Return the share of its time that it spent on tasks; loading the network does not count."""
        return min(1.0, self.busy / max((self.left or now) - self.joined, 1e-6))


@dataclasses.dataclass
class Stage:
    """Progress of one stage of a run.

    Attributes:
        name: Name of the stage.
        noun: What is counted.
        total: Number of units or images of the stage.
        done: Number of finished ones, of earlier runs too.
        cost: Estimate of the work that was left at the start, in seconds of one worker.
        fresh: Number of those that this run finished.
        failed: Number of those that were set aside.
        began: Time at which the first task began.
        ended: Time at which the last task ended.
        spent: Part of `cost` that is behind.
        measured: Part of `spent` that was finished, not set aside.
        seconds: Seconds that the `measured` part took.
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
        """Remaining worker seconds: the estimate, scaled by measured ÷ estimated time of the finished tasks."""
        return max(self.cost - self.spent, 0.0) * (self.seconds / self.measured if self.measured > 0 else 1.0)

    def rate(self, now: float) -> float:
        """Return units per second since the first task of the stage began."""
        if self.began is None:
            return 0.0
        return self.fresh / max((now if self.ended is None else self.ended) - self.began, 1e-6)

    def line(self, now: float) -> str:
        """Return the progress as text: "render 36 of 108 units, 0.52/s, 2 failed"."""
        parts = [f"{self.name} {self.done} of {self.total} {self.noun}"]
        if self.fresh and self.done < self.total:
            parts.append(f"{self.rate(now):.2g}/s")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts)


class _Note(ProgressColumn):
    """Text to the right of a bar."""

    def render(self, task: BarTask) -> Text:
        """Return the note that `ProgressReporter` sets."""
        return Text(task.fields.get("note", ""))


class ProgressReporter:
    """Shows the progress of stages that run at the same time; a context manager.

    The time left follows from estimated costs, not from counts, because units of late layers take longer; it assumes
    that all workers are busy until the end.

    Args:
        stages: The stages.
        workers: Expected number of workers.
        save: Called about every second with the fields of status.json.
        every: Seconds between two lines of text.
        stats: Statistics of the workers.
        after: Seconds of work after the stages.
    """

    def __init__(
        self,
        stages: list[Stage],
        workers: int,
        save: Callable[..., None],
        every: float,
        stats: Sequence[WorkerStats] = (),
        after: float = 0.0,
    ) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.expected_workers, self.stats = workers, stats
        self.every, self.save, self.after = every, save, after
        self.added = time.monotonic()
        self.printed_at = self.saved_at = float("-inf")
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
        """Count a finished task.

        Args:
            stage: Name of the stage.
            units: Number of units or images of the task.
            cost: Its estimated seconds.
            seconds: Its measured seconds.
            failed: Whether it was set aside.
        """
        progress = self.stages[stage]
        if progress.began is None:
            progress.began = time.monotonic() - seconds
        if failed:
            progress.failed += units
        else:
            progress.done += units
            progress.fresh += units
            progress.seconds += seconds
            progress.measured += cost
        progress.spent += cost
        self.added = time.monotonic()
        if progress.done + progress.failed >= progress.total:
            progress.ended = self.added
        self.beat()

    def beat(self) -> None:
        """Update the display if it is due; cheap to call often."""
        self._show(final=False)

    @property
    def workers(self) -> int:
        """Number of workers now; before the first has started, the expected number."""
        return sum(worker.left is None for worker in self.stats) or self.expected_workers

    @property
    def eta(self) -> float | None:
        """Seconds left; None before the first task is finished, and after the estimated time has run out.

        Tasks in progress report nothing, so an estimate that has run out cannot be corrected before the next result.
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
        elif final or now - self.printed_at >= self.every:
            lines = [stage.line(now) for stage in self.stages.values()]
            if left is not None:
                lines.append(f"{clock(left)} left")
            sys.stderr.write("; ".join(lines) + "\n")
            sys.stderr.flush()
            self.printed_at = now
        if final or now - self.saved_at >= 1.0:
            self.save(
                stages={
                    s.name: {"done": s.done, "total": s.total, "failed": s.failed, "per_second": round(s.rate(now), 3)}
                    for s in self.stages.values()
                },
                eta_seconds=None if left is None else round(left, 1),
                workers=self.workers,
            )
            self.saved_at = now


def run_report(
    stages: Sequence[Stage], workers: Sequence[WorkerStats], seconds: float, failures: int
) -> dict[str, Any]:
    """Return the report of a run as plain data: counts, seconds and rate of each stage, and use of each worker."""
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
                "name": worker.name,
                "tasks": worker.tasks,
                "seconds": round((worker.left or now) - worker.joined, 1),
                "busy": round(worker.busy, 1),
                "use": round(worker.use(now), 3),
                **({"end": worker.end} if worker.end else {}),
            }
            for worker in workers
        ],
        "versions": _distinct_versions(workers),
    }


def _distinct_versions(workers: Sequence[WorkerStats]) -> list[dict[str, Any]]:
    """Return each set of versions that workers had, with the number of workers."""
    workers_by_versions: dict[tuple[tuple[str, str], ...], int] = {}
    for worker in workers:
        if worker.versions:
            key = tuple(worker.versions.items())
            workers_by_versions[key] = workers_by_versions.get(key, 0) + 1
    return [{**dict(versions), "workers": count} for versions, count in workers_by_versions.items()]


def report_lines(summary: dict[str, Any], most: int = 8) -> list[str]:
    """Return a report as lines of text; of the workers only the `most` least busy ones are listed."""
    lines = []
    for name, stage in summary["stages"].items():
        noun, count = next(iter(stage.items()))
        if count:
            lines.append(f"{name}: {count:,} {noun} in {clock(stage['seconds'])}, {stage['per_second']:.3g}/s")
    workers = summary["workers"]
    total = sum(w["seconds"] for w in workers)
    if total:
        use = sum(w["busy"] for w in workers) / total
        lines.append(f"{len(workers)} workers, busy {use:.0%} of their time")
        for w in sorted(workers, key=lambda w: w["use"])[:most]:
            end = f"; {w['end']}" if "end" in w else ""
            lines.append(f"  {w['name']}: {w['tasks']} tasks, {w['use']:.0%} of {clock(w['seconds'])}{end}")
        if len(workers) > most:
            lines.append(f"  … and {len(workers) - most} busier ones")
    return lines
