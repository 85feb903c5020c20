"""Costs of a run besides rendering: starts and warm-ups of workers, the dataset pass, atlas.h5 and the site.

They dominate a plan of a few units. The start of this process, the loading of the network and the warm-up are
measured while the plan is made. All other costs are multiples of this process's start, which reflects the present
speed of the machine; `scripts/bench plans parts` measures these multiples.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

import psutil

from pipeline.examples.localize import PATH_SAMPLE
from pipeline.examples.sweep import ExamplesConfig
from pipeline.planning.cost_model import ZERO_SPAN, Span

# Start and end of Ray, and the start of one worker up to its first task. On two cores where a process of this project
# starts in 8.0 s, Ray took 6.1 s and 1.5 s, and a worker 6.0 s to 7.1 s.
CONNECT, CLOSE, WORKER = 0.8, 0.2, 0.85

# What the first dataset images of a process take longer, because a loop in C is compiled.
FIRST_IMAGES = 0.15

# Forward pass with the reduction of its maps, as a multiple of the forward pass alone.
REDUCTION = 1.25

# Decoding of an image in the second pass, as a multiple of that in the first.
SECOND_PASS = 1.5

# atlas.h5 and the site without any unit (on the machine above: 1.3 s of 1.6 s for 12), and one unit in both.
FINISH, PER_UNIT = 0.15, 0.0006

# The multiples were measured on one machine: (low, expected, high) factors for others.
UNCERTAINTY = (0.8, 1.0, 1.2)

# The age in seconds of an older process says nothing about its start, because it did something else before (a
# notebook, tests); `DEFAULT_START` is assumed then.
MAX_PROCESS_AGE = 120.0
DEFAULT_START = 5.0

T = TypeVar("T")


@functools.cache
def process_start() -> Span:
    """Return the seconds from the creation of this process until its first plan.

    Reading modules from a cold disk delays this process, but none that starts later: at most twice the CPU time is
    expected.
    """
    process = psutil.Process()
    age, cpu_seconds = time.time() - process.create_time(), sum(process.cpu_times()[:2])
    if not 0 < age <= MAX_PROCESS_AGE:
        return Span(DEFAULT_START / 2, DEFAULT_START, DEFAULT_START * 2)
    return Span(min(cpu_seconds, age), min(age, 2 * cpu_seconds), age)


class Stopwatch:
    """Stopwatch that sums the seconds spent inside its `with` blocks and in functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += perf_counter() - self._began

    def wrap(self, function: Callable[[], T]) -> Callable[[], T]:
        """Return `function` with its calls measured."""

        def call() -> T:
            with self:
                return function()

        return call


@dataclasses.dataclass(frozen=True)
class Amount:
    """Amount of work that determines the costs besides rendering.

    Attributes:
        workers: Number of workers.
        ray: Whether workers are Ray actors; otherwise this process is the only worker.
        joins_cluster: Whether an existing Ray cluster is used, so that Ray is not started.
        sample: Images that set the histogram ranges.
        images: Images of the first pass.
        second_pass_images: Images of the second pass.
        rendered_units: Units to render.
        units: Units in atlas.h5 and on the site.
        batch: Images per forward pass.
        render_after_pass: Whether rendering starts only after the complete dataset pass.
    """

    workers: int
    ray: bool
    joins_cluster: bool
    sample: int
    images: int
    second_pass_images: int
    rendered_units: int
    units: int
    batch: int
    render_after_pass: bool = False

    @property
    def starts(self) -> int:
        """How often the run waits for workers to start: the first round has one task, so it starts one worker only."""
        return self.sessions + bool(self.sample and self.workers > 1)

    @property
    def sessions(self) -> int:
        """Number of times that Ray is started."""
        return 2 if self.render_after_pass and self.rendered_units and (self.images or self.second_pass_images) else 1

    def images_per_worker(self, images: int, workers: int) -> int:
        """Return the number of images, padding included, that the busiest worker passes through the network."""
        return math.ceil(math.ceil(images / self.batch) / workers) * self.batch


@dataclasses.dataclass(frozen=True)
class Overheads:
    """Measured seconds that the estimates of all other costs follow from.

    Attributes:
        start: Start of a process.
        load: Loading of the network.
        warm_up: Warm-up of a process's first step.
        forward: Forward pass of one image.
        reading: Decoding of one image by one worker.
        batched: Forward pass of one image in a batch of those that effects are measured on; None if it was not timed.
    """

    start: Span
    load: Span
    warm_up: Span
    forward: Span
    reading: Span
    batched: Span | None = None

    @property
    def image_seconds(self) -> float:
        """Seconds of one worker for one of many images in the first pass."""
        return REDUCTION * self.forward.expected + self.reading.expected

    def examples(self, amount: Amount) -> Span:
        """Return the seconds of the dataset pass: sample, first pass and second pass, one after the other."""
        rounds = (
            (amount.sample, 1, 1.0),
            (amount.images, amount.workers, 1.0),
            (amount.second_pass_images, amount.workers, SECOND_PASS),
        )
        total = ZERO_SPAN
        for images, workers, reading_factor in rounds:
            padded = amount.images_per_worker(images, workers)
            # Padding passes the network, but is not decoded.
            total += self.forward * (REDUCTION * padded) + self.reading * (reading_factor * min(images, padded))
        return total

    def workers(self, amount: Amount) -> Span:
        """Return the seconds of starts and warm-ups of the workers, which all start at the same time."""
        passes = bool(amount.sample) + bool(amount.images) + bool(amount.second_pass_images)
        if not amount.ray:
            # This process, which is warm; it loads the network again in each session.
            return self.load * amount.sessions + self._scaled(FIRST_IMAGES * bool(passes))
        total = self.load * amount.starts
        total += self._scaled(WORKER * amount.starts + FIRST_IMAGES * passes)
        total += self._scaled((CLOSE if amount.joins_cluster else CONNECT + CLOSE) * amount.sessions)
        return total + (self.warm_up if amount.rendered_units else ZERO_SPAN)

    def finish(self, amount: Amount) -> Span:
        """Return the seconds from the last visualization to the last page of the site."""
        return self.load + self._scaled(FINISH + PER_UNIT * amount.units)

    def _scaled(self, multiple: float) -> Span:
        """Return a multiple of the process's start, with the uncertainty of the multiple."""
        low, expected, high = UNCERTAINTY
        start = self.start
        return Span(start.low * low, start.expected * expected, start.high * high) * multiple


def expected_second_pass_images(photographs: int, units: int, config: ExamplesConfig) -> int:
    """Return the expected number of images in the second pass, before the first pass determines it.

    Each unit is assumed to draw its examples at random: n images of which each is drawn with a probability of
    1 - exp(-units * examples / n).

    Args:
        photographs: Number of dataset images, n.
        units: Number of units.
        config: The settings of the dataset pass.
    """
    if not units:
        return 0
    examples = 3 * config.k + config.per_bin * (len(config.spectrum) - 1)
    drawn = photographs * -math.expm1(-units * examples / max(photographs, 1))
    # Random images are read beside them, as far as they are no examples.
    return round(drawn + min(PATH_SAMPLE, photographs) * (1 - drawn / max(photographs, 1)))
