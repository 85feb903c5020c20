"""Optimization steps that a GPU repeats without the host: one step is captured, and replayed for all others.

A captured step reads what differs from step to step (random transformations, numbers of the optimizer) from tables on
the device, at a counter that it increments itself. It is used only after it was compared with the ordinary step.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS
from pipeline.core.errors import first_line
from pipeline.visualization.batch import Batch
from pipeline.visualization.forward import ObjectiveForward
from pipeline.visualization.optimizers import TabulatedOptimizer
from pipeline.visualization.render_job import RenderJob
from pipeline.visualization.schedules import StepSettings
from pipeline.visualization.step import constrain, parameter_gradient

log = logging.getLogger(__name__)

# Steps of a stage that are run before one is captured: they compile kernels and fill caches.
WARM_UP = 3
# A capture costs about as much as two steps.
MIN_REPLAYS = 8

# Largest difference between the update of a replayed step and that of the ordinary one, relative to the latter's norm.
# Kernels that add in any order make the last bits of a gradient differ, and Adam enlarges differences of small ones.
TOLERANCE = 0.2

_reported: set[str] = set()


class CapturedSteps:
    """The steps of a stage from one step on.

    Args:
        job: The job, with a function `capture`.
        batch: The batch. Its images must not change in number.
        forward: The forward pass of the stage.
        first: The first step.
        rates: The learning rate of each step of the schedule.
    """

    def __init__(
        self, job: RenderJob, batch: Batch, forward: ObjectiveForward, first: int, rates: Sequence[float]
    ) -> None:
        assert job.capture is not None and isinstance(job.preset.optimizer, TabulatedOptimizer)
        self._job, self._batch, self._forward = job, batch, forward
        self._settings = job.schedule[first]
        device = batch.active.device
        self._counter = torch.full((1,), first, dtype=torch.int64, device=device)
        optimizer, age = job.preset.optimizer, batch.steps_of_state - first
        numbers = [optimizer.numbers(max(0, step + age), rate) for step, rate in enumerate(rates)]
        self._numbers = torch.tensor(numbers, dtype=torch.float32, device=device)
        batch.prepare_apply()
        self._replay = job.capture(self._step)

    def advance(self) -> None:
        """Run the next step."""
        self._replay()
        self._batch.steps_of_state += 1

    def _step(self) -> None:
        batch, at = self._batch, self._counter
        values, gradient = parameter_gradient(
            self._job, batch, self._forward, batch.draws(at), self._settings, redirects=False
        )
        batch.record(at, values)
        batch.apply(gradient, self._numbers.index_select(0, at)[0])
        constrain(self._job, batch, self._settings)
        at.add_(1)


def can_be_captured(job: RenderJob, step: int, stage_began: int) -> bool:
    """Return whether the steps of a stage from `step` on can be one captured step.

    Not in the first steps, which look for images without gradient; if the network changes from step to step; or if
    what changes is neither random nor a number of the optimizer.

    Args:
        job: The job.
        step: The step.
        stage_began: First step of its stage.
    """
    preset = job.preset
    if job.capture is None or preset.augmentations or preset.layer_penalties:
        return False
    if not isinstance(preset.optimizer, TabulatedOptimizer) or not preset.optimizer.is_tabulated:
        return False
    if step < max(REDIRECTED_STEPS, stage_began) + WARM_UP:
        return False
    settings = job.schedule[step]
    rest = [later for later in job.schedule[step:] if later.stage == settings.stage]
    return len(rest) > MIN_REPLAYS and all(_constant(later) == _constant(settings) for later in rest)


def _constant(settings: StepSettings) -> tuple[float | None, ...]:
    """Return the settings that a captured step contains."""
    return settings.blur, settings.gradient_blur, settings.penalties


def captured_steps(
    job: RenderJob,
    batch: Batch,
    forward: ObjectiveForward,
    step: int,
    rates: Sequence[float],
    ordinary: Callable[[], None],
) -> CapturedSteps | None:
    """Run a step, and return it captured; None if that fails or does not give the same.

    Args:
        job: The job.
        batch: The batch.
        forward: The forward pass of the stage.
        step: The step.
        rates: The learning rate of each step of the schedule.
        ordinary: Runs the step.
    """
    before = [part.detach().clone() for part in batch.changing]
    ordinary()
    after = [part.detach().clone() for part in batch.changing]
    try:
        captured = CapturedSteps(job, batch, forward, step, rates)
        _restore(batch, before)
        captured.advance()
        batch.steps_of_state -= 1  # the step was counted before
        difference = _difference(batch.parameters.detach(), before[0], after[0])
    except RuntimeError as error:
        # What cannot be captured runs as before; an error of the device itself appears there again.
        _report(f"{type(error).__name__}: {first_line(error)}")
    else:
        if difference <= TOLERANCE:
            return captured
        _report(f"its update differs by {difference:.2g}")
    _restore(batch, after)
    return None


@torch.no_grad()
def _restore(batch: Batch, parts: Sequence[Tensor]) -> None:
    for part, former in zip(batch.changing, parts, strict=True):
        part.copy_(former)


def _difference(parameters: Tensor, before: Tensor, after: Tensor) -> float:
    """Return the norm of the difference of two updates, relative to that of the second."""
    return float((parameters - after).norm() / (after - before).norm().clamp_min(1e-12))


def _report(reason: str) -> None:
    """Log once why steps are not replayed."""
    if reason not in _reported:
        _reported.add(reason)
        log.warning("optimization steps are launched one by one, because a captured step failed: %s", reason)
