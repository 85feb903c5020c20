"""Schedules of the optimization: stages with varying settings, and stopping rules."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core.errors import AtlasError
from pipeline.core.registry import ADDED_LATER, Registry

STOPS = Registry("stop")

Ramp = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the optimization. Pairs are the values at its start and its end; values in between are linear.

    Attributes:
        share: Fraction of all steps; shares are normalized to a sum of 1.
        layer: Layer that the objective is computed from instead, at the same channel (another head of the network);
            head@LAYER for a head that is fitted to the output of a layer.
        head: Depth of a fitted head as a fraction of the blocks, for networks that do not have `layer`.
        lr: Factor of the learning rate.
        blur: Standard deviation in pixels of a Gaussian blur of the image after every step.
        gradient_blur: Standard deviation in pixels of the preconditioner "blur"; None for the preconditioner's setting.
        penalties: Factor of the weights of all image regularizers.
        canvas: Side of the canvas as a fraction of that of the finished image.
        view: Side of the network's input as a fraction of that of the finished image; None for all of the canvas.
    """

    share: float = 1.0
    layer: str | None = None
    lr: Ramp = (1.0, 1.0)
    blur: Ramp = (0.0, 0.0)
    gradient_blur: Ramp | None = None
    penalties: Ramp = (1.0, 1.0)
    canvas: float = 1.0
    view: float | None = None
    head: float | None = dataclasses.field(default=None, metadata=ADDED_LATER)


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Settings of one step: the index of its stage, and the values of the fields of `Stage`."""

    stage: int
    lr: float
    blur: float
    gradient_blur: float | None
    penalties: float


def check(stages: Sequence[Stage]) -> None:
    """Raise `AtlasError` for invalid stages."""
    for i, stage in enumerate(stages):
        where = f"render.schedule[{i}]"
        if not stage.share > 0:
            raise AtlasError(f"{where}.share={stage.share} must be above 0.")
        if stage.head is not None and not 0 < stage.head <= 1:
            raise AtlasError(f"{where}.head={stage.head} must be above 0 and at most 1: the depth of the head.")
        if min(stage.blur) < 0 or min(stage.gradient_blur or (0.0, 0.0)) < 0:
            raise AtlasError(f"{where}: a blur cannot be negative.")
        if not 0 < stage.canvas <= 1 or not 0 < (stage.view or stage.canvas) <= stage.canvas:
            raise AtlasError(
                f"{where}: canvas={stage.canvas} and view={stage.view} must satisfy 0 < view ≤ canvas ≤ 1."
            )
    if stages and stages[-1].canvas != 1:
        raise AtlasError("render.schedule: the last stage must have canvas=1, the size of the finished image.")


def expand_schedule(stages: Sequence[Stage], steps: int) -> list[StepSettings]:
    """Return the settings of each of `steps` steps.

    Steps are divided in proportion to the shares of the stages. Each stage gets at least one step; if there are fewer
    steps than stages, the last stages get none.
    """
    stages = list(stages) or [Stage()]
    total = sum(stage.share for stage in stages)
    expanded: list[StepSettings] = []
    cumulative_share = 0.0
    for number, stage in enumerate(stages):
        cumulative_share += stage.share
        later_stages = len(stages) - 1 - number
        end = steps
        if later_stages:
            proportional = round(steps * cumulative_share / total)
            end = min(max(len(expanded) + 1, min(proportional, steps - later_stages)), steps)
        count = end - len(expanded)
        expanded += [_settings(number, stage, i / count) for i in range(count)]
    return expanded


def _settings(number: int, stage: Stage, progress: float) -> StepSettings:
    """Return the settings of a stage at a progress in [0, 1)."""

    def at(ramp: Ramp) -> float:
        return ramp[0] + (ramp[1] - ramp[0]) * progress

    gradient_blur = None if stage.gradient_blur is None else at(stage.gradient_blur)
    return StepSettings(number, at(stage.lr), at(stage.blur), gradient_blur, at(stage.penalties))


@dataclasses.dataclass(frozen=True)
class Stop:
    """Base class of stopping rules."""

    def every(self, steps: int) -> int:
        """Return the number of steps between checks, of `steps` in total; `steps` or more for no check."""
        raise NotImplementedError

    def finished(self, trace: Tensor) -> Tensor:
        """Return which images are finished, (B,) bool, from the objective at all steps so far, (steps, B)."""
        raise NotImplementedError


@STOPS.add("fixed")
@dataclasses.dataclass(frozen=True)
class Fixed(Stop):
    """Always do all steps: the cost of every image is fixed."""

    def every(self, steps: int) -> int:
        """Return `steps`: there is no check."""
        return steps

    def finished(self, trace: Tensor) -> Tensor:
        """Return False for all images, (B,)."""
        return torch.zeros(trace.shape[1], dtype=torch.bool, device=trace.device)


@STOPS.add("plateau")
@dataclasses.dataclass(frozen=True)
class Plateau(Stop):
    """Stop an image when its objective has stopped rising.

    The mean of the objective over the last `patience` steps is compared with that over the `patience` steps before. An
    image is finished if the difference is less than `tolerance` times its total rise. No image stops within the first
    `least` steps, or before the last stage of a schedule.
    """

    patience: int = 16
    tolerance: float = 0.02
    least: int = 48

    def every(self, steps: int) -> int:
        """Return `patience`."""
        return self.patience

    def finished(self, trace: Tensor) -> Tensor:
        """Return which traces have become flat, (B,) bool."""
        if len(trace) < max(self.least, 2 * self.patience):
            return torch.zeros(trace.shape[1], dtype=torch.bool, device=trace.device)
        return is_flat(trace, self.patience, self.tolerance)


def is_flat(trace: Tensor, width: int, tolerance: float) -> Tensor:
    """Return whether traces rise by less than a tolerance at their end.

    Args:
        trace: (steps, B) values of the objective.
        width: Number of steps that are averaged; the last ones are compared with those before.
        tolerance: Largest rise between the two means, as a fraction of the rise since the first step.

    Returns:
        (B,) bool; False for a trace that has not risen since the first step.
    """
    last, previous = trace[-width:].mean(0), trace[-2 * width : -width].mean(0)
    rise = last - trace[0]
    return (rise > 0) & (last - previous < tolerance * rise)
