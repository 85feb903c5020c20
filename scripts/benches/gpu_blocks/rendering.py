"""Time of the steps of a rendering, by marks before each step of the worker's own loop."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

from gpu_blocks.bench import ROUNDS, STEPS, Bench
from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS
from pipeline.engine.worker import Worker
from pipeline.visualization.evaluation import Visualization
from pipeline.visualization.preset import Preset, Size


@dataclasses.dataclass(frozen=True)
class Timed:
    """Times of one batch.

    Attributes:
        step: Seconds of a steady step: the median over rounds.
        first: Seconds of the first `REDIRECTED_STEPS` steps together.
        outside: Seconds of everything besides the steps: initial images, evaluation.
        total: Seconds by the clock.
        pictures: The visualizations.
    """

    step: float
    first: float
    outside: float
    total: float
    pictures: list[Visualization]


def timing_steps(small: bool) -> int:
    """Return the number of steps of a timed rendering."""
    return REDIRECTED_STEPS + (2 * 3 if small else ROUNDS * STEPS) + 1


def timed(
    bench: Bench, worker: Worker, name: str, channels: Sequence[int], size: Size, preset: Preset, warm: int = 4
) -> Timed:
    """Render a batch with `timing_steps` steps, and time them.

    Args:
        bench: The state.
        worker: A worker whose batch has room for all channels.
        name: Name of the layer.
        channels: The channels.
        size: (height, width) of the canvas.
        preset: The preset of the layer; its number of steps is replaced.
        warm: Steps of a rendering before, which loads kernels; 0 for none.
    """
    if warm:
        short = dataclasses.replace(preset, steps=warm, attempts=1)
        worker.stop = lambda: None
        worker.pictures(name, channels, size, short)
    marks: list[Any] = []
    worker.stop = lambda: marks.append(bench.mark())
    long = dataclasses.replace(preset, steps=timing_steps(bench.small), attempts=1)
    bench.synchronize()
    began = time.perf_counter()
    try:
        pictures = worker.pictures(name, channels, size, long)
        bench.synchronize()
        total = time.perf_counter() - began
    finally:
        worker.stop = lambda: None
    if len(marks) != long.steps:
        raise RuntimeError(f"{len(marks)} steps were made instead of {long.steps}: the batch was halved or repeated")
    per_round = 2 if bench.small else STEPS
    steady = marks[REDIRECTED_STEPS::per_round]
    step = statistics.median(bench.between(a, b) for a, b in itertools.pairwise(steady)) / per_round
    first = bench.between(marks[0], marks[REDIRECTED_STEPS])
    loop = bench.between(marks[0], marks[-1]) + step
    return Timed(step, first, max(0.0, total - loop), total, pictures)


def spread(count: int, channels: int) -> list[int]:
    """Return `count` different channels, evenly spaced; fewer if there are fewer."""
    count = min(count, channels)
    return [i * channels // count for i in range(count)]
