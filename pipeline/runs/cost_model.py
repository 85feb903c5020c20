"""How long a plan may take, from a few timed passes on this machine."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS
from pipeline.config.schema import Config
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.engine.progress import clock
from pipeline.layers.finding import Layer, capture
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model
from pipeline.visualization.loop import ROBUST_COPIES, render
from pipeline.visualization.network_perturbations import Ensemble
from pipeline.visualization.preset import Preset, Size
from pipeline.visualization.schedules import Fixed, expand_schedule

# At most so many steps are begun to be timed. The first is a warm-up (it compiles loops and kernels) and is never
# counted; in the next ones silent units pass the network twice, so a few come after those.
TIMED = REDIRECTED_STEPS + 5

# Timing ends so many seconds after the warm-up, whatever that took, but not before `LEAST` passes or steps were
# counted; of very slow ones, which take ten times as long, one is enough.
PATIENCE = 1.0
LEAST = 3

# Photographs that are read to time their decoding; the first of them is a warm-up too.
READ = 5

# A range is written beside an estimate where its ends are further apart than this.
UNSTEADY = 1.5


@dataclasses.dataclass(frozen=True)
class Span:
    """Seconds: what is expected, and a range from `low` to `high`."""

    low: float
    expected: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Span":
        """Median and quartiles.

        The fastest of some steps is what an idle machine would take, the slowest what it takes with a disturbance;
        the median is what most steps take on the machine as it is now.
        """
        return cls(*np.quantile(np.asarray(seconds, float), (0.25, 0.5, 0.75)).tolist())

    @classmethod
    def sure(cls, seconds: float) -> "Span":
        """No range."""
        return cls(seconds, seconds, seconds)

    def __add__(self, other: "Span") -> "Span":
        return Span(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def __mul__(self, factor: float) -> "Span":
        return Span(self.low * factor, self.expected * factor, self.high * factor)

    def text(self) -> str:
        """`12 s`, or `12 s (9 s to 20 s)` where the range is wide."""
        if self.high <= UNSTEADY * self.low:
            return clock(self.expected)
        return f"{clock(self.expected)} ({clock(self.low)} to {clock(self.high)})"


NONE = Span(0.0, 0.0, 0.0)


class _Enough(Exception):
    """Raised out of a picture that was begun for its time only."""


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One layer of the plan under one preset, with the channels to be rendered and the estimated seconds of it all.

    The seconds are those of one worker; `Plan.span` divides them among the crew. `spread` holds the ends of their
    range as multiples of them.
    """

    layer: Layer
    channels: tuple[int, ...]
    canvas: Size
    seconds: float
    preset: str
    spread: tuple[float, float] = (1.0, 1.0)

    def cost(self, count: int) -> float:
        """Seconds of one worker for so many of the channels."""
        return self.seconds * count / len(self.channels)

    def span(self, count: int) -> Span:
        """The same with its range."""
        cost = self.cost(count)
        return Span(cost * self.spread[0], cost, cost * self.spread[1])


@dataclasses.dataclass(frozen=True)
class Timings:
    """What was measured beside the rows: an image's forward pass, and the warm-up of a process's first step."""

    forward: Span
    warm_up: float


@dataclasses.dataclass(frozen=True)
class _Step:
    """Seconds of one step of one picture that passes the network once.

    `again` is the share of the first `REDIRECTED_STEPS` that passed it twice, `warm_up` what the first step of all
    took beyond a step.
    """

    seconds: Span
    again: float
    warm_up: float


def estimate(
    folded: Model,
    chosen: Sequence[Layer],
    rows: Sequence[PlanRow],
    config: Config,
    others: Sequence[Layer],
    lowered: Model,
) -> tuple[list[PlanRow], Timings]:
    """The same rows with estimated seconds, and what else was timed, from a few passes on this machine.

    The forward pass is timed up to every one of the `chosen` layers, which hold those of all rows, at once; for each
    preset its ratio to a whole step, and what a step costs beside the network, are measured by rendering two pictures
    for a few steps in the cheapest and the dearest layer.
    """
    reach, forward = _passes(folded, chosen)
    timed: dict[tuple[str, str], PlanRow] = {}
    warm_ups: list[float] = []
    for preset in config.presets:
        own = [row for row in rows if row.preset == preset.name]
        if own:
            found, warm_up = _preset_rows(folded, lowered, own, preset, others, reach)
            timed |= {(row.layer.name, row.preset): row for row in found}
            warm_ups.append(warm_up)
    return [timed[row.layer.name, row.preset] for row in rows], Timings(forward, max(warm_ups, default=0.0))


def reading(dataset: Dataset, recipe: Preprocessing) -> Span:
    """Seconds of one thread for reading and decoding a photograph; nothing where none of the few tried is readable."""
    few = np.unique(np.linspace(0, len(dataset.photos) - 1, READ).astype(int)).tolist()
    times: list[float] = []
    began = start = perf_counter()
    for index in few:
        (found,) = image_loading.load(dataset, [index], recipe, threads=1)
        ended = perf_counter()
        if found.array is not None:
            times.append(ended - began)
        began = ended
        if len(times) > 1 and ended - start > PATIENCE:
            break
    return Span.of(times[1:] or times) if times else NONE


def _waited(counted: int, seconds: float) -> bool:
    """Whether to time no more after so many counted passes or steps and seconds since the warm-up."""
    return seconds > PATIENCE if counted >= LEAST else counted >= 1 and seconds > 10 * PATIENCE


def _passes(folded: Model, chosen: Sequence[Layer]) -> tuple[dict[str, float], Span]:
    """Seconds of an image's forward pass up to each layer, and with its range up to the last; without the warm-up."""
    batch = 2
    device = next(folded.module.parameters()).device
    images = torch.rand(batch, folded.recipe.channels, *folded.recipe.size, device=device)
    passes: list[dict[str, float]] = []
    warm = 0.0
    while len(passes) < 2 or not _waited(len(passes) - 1, perf_counter() - warm):
        seen: dict[str, float] = {}
        began = perf_counter()

        def note(layer: Layer, _: torch.Tensor, seen: dict[str, float] = seen, began: float = began) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            seen[layer.name] = perf_counter() - began

        with capture(folded, chosen, each=note) as forward, torch.no_grad():
            forward(images)
        passes.append(seen)
        warm = warm or perf_counter()
    counted = passes[1:]
    reach = {
        layer.name: max(Span.of([seen[layer.name] for seen in counted]).expected, 1e-6) / batch for layer in chosen
    }
    return reach, Span.of([max(seen.values()) for seen in counted]) * (1 / batch)


class _Stopwatch:
    """Called at the beginning of every step; raises `_Enough` when enough were timed.

    Counts how often a step passes through any of `modules`: see `rectifiers`.
    """

    def __init__(self, device: torch.device, modules: Sequence[nn.Module]) -> None:
        self.device, self.modules = device, modules
        self.times: list[float] = []
        self.passes: list[int] = []
        self.count = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        def passed(*_: Any) -> None:
            self.count += 1

        handles = [module.register_forward_pre_hook(passed) for module in self.modules]
        try:
            with contextlib.suppress(_Enough):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.times:
            self.passes.append(max(1, self.count))
        self.times.append(perf_counter())
        self.count = 0
        counted = len(self.times) - 2
        if len(self.times) == TIMED or (counted > 0 and _waited(counted, self.times[-1] - self.times[1])):
            raise _Enough

    def measured(self, config: Preset, pictures: int) -> _Step:
        """The median step, of a preset with several stages that of each by its share of the steps."""
        seconds = [max(after - before, 1e-4) for before, after in itertools.pairwise(self.times)]
        steps = list(zip(seconds, self.passes, strict=True))
        stage_of = [moment.stage for moment in expand_schedule(config.schedule, TIMED)]
        own: dict[int, list[tuple[float, int]]] = {}
        for stage, step in list(zip(stage_of, steps, strict=False))[1:]:
            own.setdefault(stage, []).append(step)
        spans = {stage: _single(found) for stage, found in own.items()}
        total, last = NONE, min(spans)
        for moment in expand_schedule(config.schedule, config.steps):
            if moment.stage in spans:
                last = moment.stage
            # The steps of a stage that was not reached cost as much more as its canvas is larger.
            larger = (config.stages[moment.stage].canvas / config.stages[last].canvas) ** 2
            total += spans[last] * larger
        early = self.passes[1:REDIRECTED_STEPS]
        typical = spans[min(spans)].expected
        return _Step(
            total * (1 / (config.steps * pictures)),
            sum(early) / len(early) - 1,
            max(seconds[0] - typical * self.passes[0], 0.0),
        )


def _single(steps: Sequence[tuple[float, int]]) -> Span:
    """Seconds of a step that passes the network once, from (seconds, passes) of some."""
    once = [seconds for seconds, passes in steps if passes == 1]
    return Span.of(once if len(once) >= LEAST else [seconds / passes for seconds, passes in steps])


def _preset_rows(
    folded: Model,
    lowered: Model,
    rows: Sequence[PlanRow],
    config: Preset,
    others: Sequence[Layer],
    reach: Mapping[str, float],
) -> tuple[list[PlanRow], float]:
    """The rows of one preset, and the warm-up of its first step; `reach` as `_passes` gives it."""
    pixels = folded.recipe.size[0] * folded.recipe.size[1]
    named = {layer.name: layer for layer in others if layer.name in config.others}

    def network(row: PlanRow) -> float:
        return reach[row.layer.name] * row.canvas[0] * row.canvas[1] / pixels

    def area(row: PlanRow) -> float:
        height, width = row.canvas
        return (height + 2 * config.margin) * (width + 2 * config.margin)

    def step(row: PlanRow) -> _Step:
        # Two pictures, as a little of a batch; of a dear layer one tells enough.
        few = 1 if network(row) > PATIENCE / 10 else 2
        return _timed_step(folded, lowered, row, config, named, few)

    cheapest, dearest = min(rows, key=network), max(rows, key=network)
    first, last = step(cheapest), step(dearest)
    # What a step costs beside the network, by area; the dearest layer's steps can't take less than that.
    fixed = max(first.seconds.expected - 2.7 * network(cheapest), 0.0) / area(cheapest)
    fixed = min(fixed, last.seconds.expected / area(dearest))
    ratio = (last.seconds.expected - fixed * area(dearest)) / network(dearest)
    low = min(s.seconds.low / s.seconds.expected for s in (first, last))
    high = max(s.seconds.high / s.seconds.expected for s in (first, last))
    steps = config.steps + min(config.steps, REDIRECTED_STEPS) * (first.again + last.again) / 2
    timed = []
    for row in rows:
        pictures = len(row.channels) * config.variants
        each = fixed * area(row) + ratio * network(row)
        # Measuring the finished picture costs forward passes on its shaken copies; every layer warms up by itself.
        extra = (ROBUST_COPIES + 2) * network(row)
        warm_up = last.warm_up * network(row) / network(dearest)
        seconds = pictures * (each * steps + extra) + warm_up
        timed.append(dataclasses.replace(row, seconds=seconds, spread=(low, high)))
    return timed, first.warm_up


def _timed_step(
    folded: Model, lowered: Model, row: PlanRow, config: Preset, named: Mapping[str, Layer], few: int
) -> _Step:
    """Time the first steps of `few` of a row's channels."""
    preset = dataclasses.replace(config, steps=TIMED, attempts=1, stop=Fixed())
    units = [(c, v) for c in row.channels[:few] for v in range(preset.variants)]
    blank = torch.full((folded.recipe.channels, *row.canvas), 0.5)
    modules = [folded.module] if lowered.module is folded.module else [folded.module, lowered.module]
    watch = _Stopwatch(next(folded.module.parameters()).device, modules)
    with watch.counting():
        # Other checkpoints cost what this one does, and any picture what a grey one does.
        render(
            folded, row.layer, units, preset, 0, row.canvas, watch,
            lowered=lowered, others=named, starts=dict.fromkeys(units, blank),
            ensemble=[folded] * sum(len(a.checkpoints) for a in preset.augmentations if isinstance(a, Ensemble)),
        )  # fmt: skip
    return watch.measured(config, len(units))
