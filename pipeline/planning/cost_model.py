"""Cost model of a plan: estimated seconds of its rows, from a few timed steps and forward passes on this machine."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS
from pipeline.acceleration.variants import ModelVariants
from pipeline.config.schema import Config
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.engine.devices import halved_until_it_fits
from pipeline.engine.progress import clock
from pipeline.layers.finding import Layer, capture
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model
from pipeline.visualization.loop import render
from pipeline.visualization.network_penalties import Normalization
from pipeline.visualization.network_perturbations import Ensemble
from pipeline.visualization.preset import Preset, Size
from pipeline.visualization.render_job import ROBUST_COPIES, RenderJob
from pipeline.visualization.schedules import Fixed, expand_schedule

# Largest number of steps that are started for timing. The first is a warm-up (it compiles loops and kernels) and is
# never counted; with redirected ReLU gradients the next steps may pass the network twice, so a few more follow.
MAX_STEPS = REDIRECTED_STEPS + 5

# Timing ends this many seconds after the warm-up, but not before `MIN_MEASUREMENTS` passes or steps were counted. If
# these take more than ten times as long, one measurement is enough. Each timing of a short run takes at most this share
# of the run.
TIME_LIMIT = 1.0
TIME_SHARE = 0.02
MIN_MEASUREMENTS = 3

# Images of a timed forward pass on a CPU, and channels of a timed step: two stand for a batch, as the time of a core
# is proportional to their number. That of a GPU is not: there batches are as large as those of the work.
TIMED_BATCH = 2

# Batches of this part of the size are timed on a GPU as well, which tells the part of the time that every batch takes.
SMALLER_BATCH = 4

# Images that are read to time their decoding; the first of them is a warm-up, too.
TIMED_IMAGES = 5

# An estimate is printed with its range if the upper end exceeds the lower end by more than this factor.
WIDE_RANGE = 1.5

# Smallest durations in seconds that are used: ratios of them must stay finite.
MIN_PASS_SECONDS = 1e-6
MIN_STEP_SECONDS = 1e-4

# Cost of an optimization step as a multiple of the forward pass, assumed to separate the part of a step that does not
# depend on the network.
STEP_TO_FORWARD = 2.7


@dataclasses.dataclass(frozen=True)
class Span:
    """An estimate in seconds with its range.

    Attributes:
        low: Lower end of the range.
        expected: The estimate.
        high: Upper end of the range.
    """

    low: float
    expected: float
    high: float

    @classmethod
    def from_measurements(cls, seconds: Sequence[float]) -> "Span":
        """Return the median and the quartiles of some measurements.

        The fastest step is what an idle machine takes, the slowest includes a disturbance; the median is what most
        steps take on the machine in its present state.
        """
        return cls(*np.quantile(np.asarray(seconds, float), (0.25, 0.5, 0.75)).tolist())

    @classmethod
    def exact(cls, seconds: float) -> "Span":
        """Return an estimate without uncertainty."""
        return cls(seconds, seconds, seconds)

    def __add__(self, other: "Span") -> "Span":
        return Span(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def __mul__(self, factor: float) -> "Span":
        return Span(self.low * factor, self.expected * factor, self.high * factor)

    def text(self) -> str:
        """Return `12 s`, or `12 s (9 s to 20 s)` if the range is wide."""
        if self.high <= WIDE_RANGE * self.low:
            return clock(self.expected)
        return f"{clock(self.expected)} ({clock(self.low)} to {clock(self.high)})"


ZERO_SPAN = Span(0.0, 0.0, 0.0)


class _TimingComplete(Exception):
    """Raised to leave a rendering that was started for its timing only."""


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One layer of a plan under one preset.

    Attributes:
        layer: The layer.
        channels: Channels to render.
        canvas: (height, width) of the visualizations in pixels, without margins.
        seconds: Estimated seconds of one worker for all channels; `Plan.span` divides them among the workers.
        preset: Name of the preset.
        spread: Ends of the range of the estimate, as multiples of `seconds`.
        display: Whether these are display images.
    """

    layer: Layer
    channels: tuple[int, ...]
    canvas: Size
    seconds: float
    preset: str
    spread: tuple[float, float] = (1.0, 1.0)
    display: bool = False

    def cost(self, count: int) -> float:
        """Return the seconds of one worker for `count` of the channels."""
        return self.seconds * count / len(self.channels)

    def span(self, count: int) -> Span:
        """Return the seconds of one worker for `count` of the channels, with their range."""
        cost = self.cost(count)
        return Span(cost * self.spread[0], cost, cost * self.spread[1])


@dataclasses.dataclass(frozen=True)
class Timings:
    """Measurements that belong to no row.

    Attributes:
        forward: Seconds of one image's forward pass.
        warm_up: Seconds by which the first step of a process exceeds a later one.
    """

    forward: Span
    warm_up: float


@dataclasses.dataclass(frozen=True)
class _StepTiming:
    """Timing of one optimization step.

    Attributes:
        seconds: Seconds of a step for one visualization that passes the network once, in a full batch.
        second_passes: Share of the first `REDIRECTED_STEPS` steps that passed the network twice.
        warm_up: Seconds by which the very first step exceeded a later one.
        fixed_share: Share of a step of a full batch that a batch of any size takes; 0 on a CPU.
    """

    seconds: Span
    second_passes: float
    warm_up: float
    fixed_share: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Networks:
    """What the timed renderings run on.

    Attributes:
        folded: The model with folded normalization.
        lowered: The variant of the model that steps run on.
        other_layers: Layers that presets use besides the unit's own.
        forward_seconds: Seconds of one image's forward pass up to each layer, by layer name.
        normalizations: By the name of the unit's layer, those that network penalties compare.
        precision: Precision of the steps.
        config: The configuration of the run.
    """

    folded: Model
    lowered: Model
    other_layers: Sequence[Layer]
    forward_seconds: Mapping[str, float]
    normalizations: Mapping[str, Sequence[Normalization]]
    precision: str
    config: Config

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.folded.device

    def full_batch(self, row: PlanRow, preset: Preset) -> int:
        """Return the number of channels in a batch of a layer with enough of them."""
        return self.config.channels_per_batch(preset, row.layer.channels, self.device.type)

    def batch_factor(self, row: PlanRow, preset: Preset, fixed_share: float) -> float:
        """Return how many times the seconds of a full batch a visualization of the row takes: 1 on a CPU.

        Args:
            row: The row, whose channels may be too few for full batches.
            preset: Its preset.
            fixed_share: Share of a step of a full batch that a batch of any size takes.
        """
        batches = math.ceil(len(row.channels) / self.full_batch(row, preset))
        return 1 + fixed_share * (batches * self.full_batch(row, preset) / len(row.channels) - 1)

    def network_seconds(self, row: PlanRow) -> float:
        """Return the seconds of one forward pass on the row's canvas: proportional to its area."""
        pixels = self.folded.preprocessing.size[0] * self.folded.preprocessing.size[1]
        return self.forward_seconds[row.layer.name] * row.canvas[0] * row.canvas[1] / pixels


def estimate(
    chosen: Sequence[Layer],
    rows: Sequence[PlanRow],
    config: Config,
    others: Sequence[Layer],
    variants: ModelVariants,
    images: int,
    normalizations: Mapping[str, Sequence[Normalization]] | None = None,
) -> tuple[list[PlanRow], Timings]:
    """Return the rows of a plan with estimated seconds.

    One series of forward passes is timed up to every layer of `chosen`. For each preset, the ratio of a step to a
    forward pass and the cost of a step beside the network are measured by rendering a few visualizations (on a GPU, a
    batch of them) for a few steps in the cheapest and in the most expensive layer.

    Args:
        chosen: Layers of the plan, which include those of all rows.
        rows: Rows without estimates.
        config: The configuration of the run.
        others: Layers that presets use besides the unit's own.
        variants: The folded model and the model that steps run on.
        images: Images of the dataset pass.
        normalizations: By the name of the unit's layer, those that network penalties compare.

    Returns:
        The rows, in their order, and the timings that belong to no row.
    """
    steps = {preset.name: preset.variants * preset.steps for preset in config.rendered_presets}
    passes = images + STEP_TO_FORWARD * sum(len(row.channels) * steps[row.preset] for row in rows)
    batch = config.examples.batch if times_whole_batches(variants.folded.device) else TIMED_BATCH
    forward_seconds, forward = halved_until_it_fits(
        batch, lambda size: _time_forward(variants.folded, chosen, passes, size)
    )
    norms = normalizations or {}
    networks = _Networks(variants.folded, variants.steps, others, forward_seconds, norms, variants.precision, config)
    timed: dict[tuple[str, str], PlanRow] = {}
    warm_ups: list[float] = []
    for preset in config.rendered_presets:
        preset_rows = [row for row in rows if row.preset == preset.name]
        if preset_rows:
            timed_rows, warm_up = _time_preset(networks, preset_rows, preset)
            timed |= {(row.layer.name, row.preset): row for row in timed_rows}
            warm_ups.append(warm_up)
    return [timed[row.layer.name, row.preset] for row in rows], Timings(forward, max(warm_ups, default=0.0))


def time_image_loading(dataset: Dataset, recipe: Preprocessing) -> Span:
    """Return the seconds that one thread needs to read and decode a dataset image.

    They are zero if none of the `TIMED_IMAGES` images can be read.
    """
    indices = np.unique(np.linspace(0, len(dataset.images) - 1, TIMED_IMAGES).astype(int)).tolist()
    times: list[float] = []
    began = start = perf_counter()
    for index in indices:
        (loaded,) = image_loading.load_images(dataset, [index], recipe, threads=1)
        ended = perf_counter()
        if loaded.array is not None:
            times.append(ended - began)
        began = ended
        if len(times) > 1 and ended - start > TIME_LIMIT:
            break
    return Span.from_measurements(times[1:] or times) if times else ZERO_SPAN


def _time_limit(count: float, seconds: float) -> float:
    """Return the seconds after which the timing of an operation ends that takes `seconds`, `count` times in a run."""
    return min(TIME_LIMIT, TIME_SHARE * count * seconds)


def _timing_complete(counted: int, seconds: float, limit: float) -> bool:
    """Return whether timing ends after `counted` passes or steps and `seconds` since the warm-up."""
    if counted >= MIN_MEASUREMENTS:
        return seconds > limit
    return counted >= 1 and seconds > 10 * TIME_LIMIT


def times_whole_batches(device: torch.device) -> bool:
    """Return whether the time of a device is not proportional to the number of images, so that batches are timed."""
    return device.type != "cpu"


def time_batched_forward(folded: Model, layer: Layer, batch: int) -> Span:
    """Return the seconds of one image in a forward pass of `batch` images up to a layer.

    Ablations run the network so often that what a pass costs apart from its images counts.
    """
    _, span = halved_until_it_fits(batch, lambda size: _time_forward(folded, [layer], size, size))
    return span


def _time_forward(
    folded: Model, layers: Sequence[Layer], run_passes: float, batch: int
) -> tuple[dict[str, float], Span]:
    """Return one image's seconds up to each layer, and up to the last one with their range; without the warm-up."""
    device = folded.device
    images = torch.rand(batch, folded.preprocessing.channels, *folded.preprocessing.size, device=device)
    passes: list[dict[str, float]] = []
    warm = limit = 0.0
    while len(passes) < 2 or not _timing_complete(len(passes) - 1, perf_counter() - warm, limit):
        reached: dict[str, float] = {}
        began = perf_counter()

        def note(layer: Layer, _: torch.Tensor, reached: dict[str, float] = reached, began: float = began) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            reached[layer.name] = perf_counter() - began

        with capture(folded, layers, each=note) as forward, torch.no_grad():
            forward(images)
        passes.append(reached)
        warm = warm or perf_counter()
        limit = _time_limit(run_passes, max(reached.values()) / batch)
    counted = passes[1:]
    by_layer = {}
    for layer in layers:
        seconds = Span.from_measurements([reached[layer.name] for reached in counted]).expected
        by_layer[layer.name] = max(seconds, MIN_PASS_SECONDS) / batch
    return by_layer, Span.from_measurements([max(reached.values()) for reached in counted]) * (1 / batch)


class _StepTimer:
    """Times optimization steps; it is called at the beginning of each.

    A call raises `_TimingComplete` when enough steps were timed. Forward passes through any of `modules` are
    counted, because steps with redirected ReLU gradients may need two.

    Attributes:
        run_steps: Steps of all batches of the run.
        each: Forward passes of a step without redirected gradients.
        times: Time of each call.
        passes: Forward passes of each timed step, divided by `each`.
        count: Forward passes since the last call.
    """

    def __init__(self, device: torch.device, modules: Sequence[nn.Module], run_steps: float, each: int = 1) -> None:
        self.device, self.modules, self.run_steps, self.each = device, modules, run_steps, each
        self.times: list[float] = []
        self.passes: list[int] = []
        self.count = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count forward passes, and end the block without an error when `_TimingComplete` is raised."""

        def count_pass(*_: Any) -> None:
            self.count += 1

        handles = [module.register_forward_pre_hook(count_pass) for module in self.modules]
        try:
            with contextlib.suppress(_TimingComplete):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.times:
            self.passes.append(max(1, self.count // self.each))
        self.times.append(perf_counter())
        self.count = 0
        counted = len(self.times) - 2
        if len(self.times) == MAX_STEPS:
            raise _TimingComplete
        if counted > 0:
            seconds = self.times[-1] - self.times[1]
            if _timing_complete(counted, seconds, _time_limit(self.run_steps, seconds / counted)):
                raise _TimingComplete

    def timing(self, preset: Preset, batch: int) -> _StepTiming:
        """Return the timing of a step.

        With several stages, the medians of the stages are weighted by their share of the preset's steps.

        Args:
            preset: The preset whose steps were timed.
            batch: Number of visualizations in each step.
        """
        seconds = [max(after - before, MIN_STEP_SECONDS) for before, after in itertools.pairwise(self.times)]
        stage_spans = self._stage_spans(preset, seconds)
        total, last = ZERO_SPAN, min(stage_spans)
        for step in expand_schedule(preset.schedule, preset.steps):
            if step.stage in stage_spans:
                last = step.stage
            # A stage that was not reached costs more in proportion to the area of its canvas.
            larger = (preset.stages[step.stage].canvas / preset.stages[last].canvas) ** 2
            total += stage_spans[last] * larger
        early = self.passes[1:REDIRECTED_STEPS]
        typical = stage_spans[min(stage_spans)].expected
        return _StepTiming(
            seconds=total * (1 / (preset.steps * batch)),
            second_passes=sum(early) / len(early) - 1,
            warm_up=max(seconds[0] - typical * self.passes[0], 0.0),
        )

    def _stage_spans(self, preset: Preset, seconds: Sequence[float]) -> dict[int, Span]:
        """Return the seconds of a step with one pass, for each stage with a timed step after the warm-up."""
        timed = zip(seconds, self.passes, strict=True)
        schedule = expand_schedule(preset.schedule, MAX_STEPS)
        by_stage: dict[int, list[tuple[float, int]]] = {}
        for step, timed_step in list(zip(schedule, timed, strict=False))[1:]:
            by_stage.setdefault(step.stage, []).append(timed_step)
        return {stage: _single_pass_seconds(steps) for stage, steps in by_stage.items()}


def _single_pass_seconds(steps: Sequence[tuple[float, int]]) -> Span:
    """Return the seconds of a step that passes the network once, from (seconds, passes) of several steps."""
    single = [seconds for seconds, passes in steps if passes == 1]
    if len(single) >= MIN_MEASUREMENTS:
        return Span.from_measurements(single)
    return Span.from_measurements([seconds / passes for seconds, passes in steps])


def _time_preset(networks: _Networks, rows: Sequence[PlanRow], preset: Preset) -> tuple[list[PlanRow], float]:
    """Return the rows of one preset with estimated seconds, and the warm-up of its first step."""

    def area(row: PlanRow) -> float:
        height, width = row.canvas
        return (height + 2 * preset.margin) * (width + 2 * preset.margin)

    cheapest, dearest = min(rows, key=networks.network_seconds), max(rows, key=networks.network_seconds)
    run_steps = sum(len(row.channels) for row in rows) * preset.variants * preset.steps
    cheap_step = _time_step(networks, cheapest, preset, run_steps)
    dear_step = cheap_step if dearest is cheapest else _time_step(networks, dearest, preset, run_steps)
    # Seconds of a step per pixel that do not depend on the network; at most a step in the most expensive layer.
    cheap_rest = max(cheap_step.seconds.expected - STEP_TO_FORWARD * networks.network_seconds(cheapest), 0.0)
    per_pixel = min(cheap_rest / area(cheapest), dear_step.seconds.expected / area(dearest))
    network_part = dear_step.seconds.expected - per_pixel * area(dearest)
    ratio = network_part / networks.network_seconds(dearest)
    low = min(step.seconds.low / step.seconds.expected for step in (cheap_step, dear_step))
    high = max(step.seconds.high / step.seconds.expected for step in (cheap_step, dear_step))
    second_passes = (cheap_step.second_passes + dear_step.second_passes) / 2
    fixed_share = (cheap_step.fixed_share + dear_step.fixed_share) / 2
    passes = preset.steps + min(preset.steps, REDIRECTED_STEPS) * second_passes
    timed = []
    for row in rows:
        network = networks.network_seconds(row)
        step = (per_pixel * area(row) + ratio * network) * networks.batch_factor(row, preset, fixed_share)
        # Measuring a finished visualization costs forward passes on transformed copies of it; each layer has a
        # warm-up of its own.
        measuring = (ROBUST_COPIES + 2) * network
        warm_up = dear_step.warm_up * network / networks.network_seconds(dearest)
        seconds = len(row.channels) * preset.variants * (step * passes + measuring) + warm_up
        timed.append(dataclasses.replace(row, seconds=seconds, spread=(low, high)))
    return timed, cheap_step.warm_up


def _time_step(networks: _Networks, row: PlanRow, preset: Preset, run_steps: int) -> _StepTiming:
    """Time a step in the layer of a row; the run has `run_steps` steps of single visualizations."""
    if not times_whole_batches(networks.device):
        # In an expensive layer one channel is enough.
        count = 1 if networks.network_seconds(row) > TIME_LIMIT / 10 else TIMED_BATCH
        return _time_channels(networks, row, preset, run_steps, count)
    full = networks.full_batch(row, preset)
    count = min(len(row.channels), full)
    count, timing = halved_until_it_fits(
        count, lambda size: (size, _time_channels(networks, row, preset, run_steps, size))
    )
    small = count // SMALLER_BATCH
    if small == 0:
        return dataclasses.replace(timing, fixed_share=1.0, seconds=timing.seconds * (count / full))
    smaller = _time_channels(networks, row, preset, run_steps, small)
    # Seconds of a batch of n channels: fixed + n * each.
    whole, part = timing.seconds.expected * count, smaller.seconds.expected * small
    each = min(max((whole - part) / (count - small), 0.0), whole / count)
    fixed = whole - each * count
    in_full_batch = fixed + each * full
    seconds = timing.seconds * (in_full_batch / full / timing.seconds.expected)
    return dataclasses.replace(timing, seconds=seconds, fixed_share=fixed / in_full_batch)


def _time_channels(networks: _Networks, row: PlanRow, preset: Preset, run_steps: int, count: int) -> _StepTiming:
    """Time the first steps of the first `count` channels of a row, as one batch."""
    folded, lowered = networks.folded, networks.lowered
    short = dataclasses.replace(preset.for_layer(row.layer), steps=MAX_STEPS, attempts=1, stop=Fixed())
    units = [(channel, variant) for channel in row.channels[:count] for variant in range(short.variants)]
    gray = torch.full((folded.preprocessing.channels, *row.canvas), 0.5)
    modules = [folded.module] if lowered.module is folded.module else [folded.module, lowered.module]
    # Images that activations are compared with pass the network too.
    each = 2 if short.layer_penalties or short.objective.compares_with == "image" else 1
    timer = _StepTimer(networks.device, modules, run_steps / len(units), each)
    ensembles = [a for a in short.augmentations if isinstance(a, Ensemble)]
    with timer.counting():
        # Another checkpoint costs as much as this one, and any initial image as much as a gray one.
        compares = short.objective.compares_with
        job = RenderJob(
            folded,
            row.layer,
            short,
            0,
            row.canvas,
            timer,
            step_model=lowered,
            target_image=gray if compares == "image" else None,
            layer_mean=torch.ones(row.layer.channels, device=timer.device) if compares == "mean" else None,
            layers={layer.name: layer for layer in networks.other_layers if layer.name in preset.others},
            initial_images=dict.fromkeys(units, gray),
            normalizations=networks.normalizations.get(row.layer.name, ()),
            ensemble=[folded] * sum(len(ensemble.checkpoints) for ensemble in ensembles),
            precision=networks.precision,
        )
        render(job, units)
    return timer.timing(preset, len(units))
