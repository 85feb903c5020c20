"""Time of a whole atlas from the times of some layers."""

import dataclasses
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Point:
    """Times of a batch of one layer.

    Attributes:
        cost: GFLOP of an image-step.
        batch: Number of images.
        step: Seconds of a steady step.
        first: Seconds of the first steps, in which units without gradient run twice, together.
        outside: Seconds besides the steps.
        bare: Seconds of a step of the bare loop.
    """

    cost: float
    batch: int
    step: float
    first: float
    outside: float
    bare: float


def interpolated(known: Sequence[tuple[float, float]], x: float) -> float:
    """Return the value at `x` of the line through (x, value) pairs.

    Below the cheapest layer it is constant, as there the host decides; above the most expensive one it is proportional.
    """
    known = sorted(known)
    if x <= known[0][0]:
        return known[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(known):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-12)
    return known[-1][1] * x / known[-1][0]


def minutes(
    points: Sequence[Point], table: Sequence[tuple[float, int]], steps: int, first_steps: int
) -> tuple[float, float, float]:
    """Return the minutes of all channels: those of the steps, with everything else that was timed, of the bare loop.

    Args:
        points: Measured layers.
        table: GFLOP of an image-step and number of channels of every layer.
        steps: Number of steps of an image.
        first_steps: Number of steps that `Point.first` is about.
    """
    loop = outside = alone = 0.0
    for cost, channels in table:
        step, first, rest, bare = (
            interpolated([(p.cost, getattr(p, name) / p.batch) for p in points], cost)
            for name in ("step", "first", "outside", "bare")
        )
        loop += channels * (first + (steps - first_steps) * step)
        outside += channels * rest
        alone += channels * steps * bare
    return loop / 60, (loop + outside) / 60, alone / 60
