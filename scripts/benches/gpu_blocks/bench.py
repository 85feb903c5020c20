"""What every block needs: sizes, the time that is left, rows of results, and times of work on a device."""

import contextlib
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_blocks.rows import append

# Rounds whose median is a time of a step, and steps of a round: 80 steps together.
ROUNDS, STEPS = 5, 16


@dataclasses.dataclass
class Bench:
    """The state of one call.

    Attributes:
        device: "cuda" or "cpu".
        out: Folder of the results.
        carried: Folder that `gpu.py prepare` made; None without one.
        references: File of reference values; None without one.
        block: Name of the present block.
        deadline: Time (`time.time()`) at which the present block should end.
        small: Whether sizes are those of a dry run.
    """

    device: str
    out: Path
    carried: Path | None = None
    references: Path | None = None
    block: str = ""
    deadline: float = float("inf")
    small: bool = False

    def row(self, what: str, **values: Any) -> dict[str, Any]:
        """Append a row to gpu.jsonl and print it; return it."""
        row = {"block": self.block, "what": what, **{k: _plain(v) for k, v in values.items()}}
        append(self.out, row)
        return row

    def left(self) -> float:
        """Return the seconds until the present block should end."""
        return self.deadline - time.time()

    def has(self, seconds: float, what: str) -> bool:
        """Return whether there are `seconds` left for a measurement; if not, say that it is left out."""
        if self.small or self.left() >= seconds:
            return True
        self.row("left out", of=what, reason=f"needs about {seconds:.0f} s, {max(self.left(), 0):.0f} s are left")
        return False

    # ------------------------------------------------------------------------------------------------------- times

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """Return a point in the time line of the device, after the work that was launched."""
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        """Return the seconds between two marks."""
        if self.device != "cuda":
            return second - first
        second.synchronize()
        return first.elapsed_time(second) / 1e3

    def wall(self, work: Callable[[], Any]) -> float:
        """Return the seconds of `work` by the clock, with its work on the device."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began

    def step_seconds(self, step: Callable[[], Any], steps: int = STEPS, rounds: int = ROUNDS, warm: int = 4) -> float:
        """Return the seconds of one call of `step`: the median over rounds of several calls."""
        if self.small:
            steps, rounds, warm = 2, 3, 1
        for _ in range(warm):
            step()
        marks = [self.mark()]
        for _ in range(rounds):
            for _ in range(steps):
                step()
            marks.append(self.mark())
        return median_between(self, marks) / steps

    # ------------------------------------------------------------------------------------------------------ memory

    def clean(self) -> None:
        """Free what the caching allocator keeps, and begin a new peak."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, float]:
        """Return the peak memory since `clean` in GB, allocated and reserved."""
        if self.device != "cuda":
            return {}
        return {
            "allocated GB": torch.cuda.max_memory_allocated() / 1e9,
            "reserved GB": torch.cuda.max_memory_reserved() / 1e9,
        }


def median_between(bench: Bench, marks: Sequence[Any]) -> float:
    """Return the median of the seconds between consecutive marks."""
    return statistics.median(bench.between(a, b) for a, b in itertools.pairwise(marks))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, numbers with five significant digits."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.5g}") if value == value and abs(value) != float("inf") else str(value)
    return value


@contextlib.contextmanager
def attributes(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes of objects, and restore them."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
