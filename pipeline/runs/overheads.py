"""What a run takes beside its pictures: its workers' start, their warm-up, the dataset pass, atlas.h5 and the site.

A plan of a few units is little else. What can be is measured while the plan is made: what this process took to start,
to load the network and to warm up. The rest is in multiples of this process's start, which is as slow as the machine
is now: `scripts/bench plans parts` measures them.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

import psutil

from pipeline.examples.sweep import ExamplesConfig
from pipeline.runs.cost_model import NONE, Span

# Ray's own start and end, and one worker's, from being asked for to its first task. On two cores where a process of
# this project starts in 8.0 s, Ray took 6.1 s and 1.5 s, and a worker 6.0 s to 7.1 s.
CONNECT, CLOSE, WORKER = 0.8, 0.2, 0.85

# The first photographs that a process looks at (a loop in C is compiled), reduction of their maps as a multiple of the
# forward pass, and how much longer a second look takes.
FIRST_PHOTOGRAPHS, REDUCED, LOOK = 0.15, 1.25, 1.5

# atlas.h5 and the site without any unit (there: 1.3 s of 1.6 s for 12), and one unit in both.
FINISH, UNIT = 0.15, 0.0006

# The multiples were measured on one machine: the range that they are given on others.
UNSURE = (0.8, 1.0, 1.2)

# A process that is older did something else first (a notebook, tests): its age says nothing about its start.
OLDEST = 120.0
USUAL_START = 5.0

T = TypeVar("T")


@functools.cache
def own_start() -> Span:
    """Seconds from this process's creation until now, when it is about to make its first plan.

    Reading modules from a cold disk takes it long, and no process after it: it expects at most twice the CPU time.
    """
    process = psutil.Process()
    age, used = time.time() - process.create_time(), sum(process.cpu_times()[:2])
    if not 0 < age <= OLDEST:
        return Span(USUAL_START / 2, USUAL_START, USUAL_START * 2)
    return Span(min(used, age), min(age, 2 * used), age)


class Lap:
    """Sums the seconds that are spent inside of it, or of functions that it has `timed`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += perf_counter() - self._began

    def timed(self, function: Callable[[], T]) -> Callable[[], T]:
        """The same function."""

        def call() -> T:
            with self:
                return function()

        return call


@dataclasses.dataclass(frozen=True)
class Amount:
    """What is to be done beside rendering, and by whom.

    `sample` photographs set the ranges of histograms, `photographs` are swept and `looks` looked at again; of
    `units` pages are made. `apart` says that pictures wait for the whole dataset pass.
    """

    workers: int
    ray: bool
    joins: bool
    sample: int
    photographs: int
    looks: int
    rendered: int
    units: int
    batch: int
    apart: bool = False

    @property
    def rounds(self) -> int:
        """How often workers are started: each round needs all of the one before."""
        passes = bool(self.sample) + bool(self.photographs)
        if self.apart and self.looks and self.rendered:
            return passes + 2
        return passes + bool(self.looks or self.rendered)

    @property
    def sessions(self) -> int:
        """How often Ray is started."""
        return 2 if self.apart and self.rendered and (self.photographs or self.looks) else 1

    def waves(self, photographs: int, workers: int) -> int:
        """Photographs that the busiest worker passes through the network: whole batches."""
        return math.ceil(math.ceil(photographs / self.batch) / workers) * self.batch


@dataclasses.dataclass(frozen=True)
class Overheads:
    """Measured seconds: of a process's start, of the network's loading, of a process's first step, of a photograph.

    `forward` is a photograph's pass through the network, `reading` its decoding by one worker.
    """

    start: Span
    load: Span
    warm_up: Span
    forward: Span
    reading: Span

    @property
    def photograph(self) -> float:
        """Seconds that one worker needs for one of many photographs."""
        return REDUCED * self.forward.expected + self.reading.expected

    def examples(self, amount: Amount) -> Span:
        """The dataset pass, its three rounds one after the other; of a padded batch only the photographs are read."""
        total = NONE
        for count, workers, more in (
            (amount.sample, 1, 1.0), (amount.photographs, amount.workers, 1.0), (amount.looks, amount.workers, LOOK)
        ):  # fmt: skip
            waves = amount.waves(count, workers)
            total += self.forward * (REDUCED * waves) + self.reading * (more * min(count, waves))
        return total

    def workers(self, amount: Amount) -> Span:
        """Starts and warm-ups of the workers, which all start at the same time."""
        passes = bool(amount.sample) + bool(amount.photographs) + bool(amount.looks)
        if not amount.ray:
            # This very process, which is warm; it loads the network again in each round.
            return self.load * amount.rounds + self._scaled(FIRST_PHOTOGRAPHS * bool(passes))
        total = self.load * amount.rounds
        total += self._scaled(WORKER * amount.rounds + FIRST_PHOTOGRAPHS * passes)
        total += self._scaled((CLOSE if amount.joins else CONNECT + CLOSE) * amount.sessions)
        return total + (self.warm_up if amount.rendered else NONE)

    def finish(self, amount: Amount) -> Span:
        """From the last picture to the last page."""
        return self.load + self._scaled(FINISH + UNIT * amount.units)

    def _scaled(self, multiple: float) -> Span:
        low, middle, high = UNSURE
        start = self.start
        return Span(start.low * low, start.expected * middle, start.high * high) * multiple


def looked_at(photographs: int, units: int, config: ExamplesConfig) -> int:
    """How many photographs are looked at again, before the pass says which: as if each unit drew its own at random."""
    each = 3 * config.k + config.per_bin * (len(config.spectrum) - 1)
    return round(photographs * -math.expm1(-units * each / max(photographs, 1)))
