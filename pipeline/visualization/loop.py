"""The optimization loop: from a batch of units of one layer to their feature visualizations.

The loss is the *sum* of the objective over the batch. With the mean, gradients would scale with the batch size, and
Adam's epsilon would make results depend on it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence

import torch

from pipeline.acceleration.precision import steps_in
from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS
from pipeline.core.registry import registered_name
from pipeline.core.seeds import seed_of
from pipeline.visualization.batch import Batch
from pipeline.visualization.captured_steps import CapturedSteps, can_be_captured, captured_steps
from pipeline.visualization.evaluation import RESTARTED, SILENT, Visualization, evaluate, to_pictures
from pipeline.visualization.forward import ObjectiveForward, objective_forward
from pipeline.visualization.network_perturbations import ActivePerturbation, Ensemble
from pipeline.visualization.preset import ChannelVariant, Preset
from pipeline.visualization.render_job import BatchStart, RenderJob, draw_start
from pipeline.visualization.step import constrain, parameter_gradient


def render(job: RenderJob, units: Sequence[ChannelVariant], start: BatchStart | None = None) -> list[Visualization]:
    """Render feature visualizations of some units of a layer, in one batch.

    An image whose objective did not rise, or was not finite, is rendered again with another seed and half the learning
    rate, in at most `job.preset.attempts` attempts; after the last it is returned with the status "failed". With batch
    terms, all variants of its channel are rendered again.

    Args:
        job: The network, the layer, the preset and the seed.
        units: Pairs of (channel, variant). With batch terms, all variants of a channel must follow each other.
        start: `draw_start` of the units for attempt 0, if it is known already.

    Returns:
        One visualization for each unit, in the order of `units`.
    """
    if len(units) > 1 and job.preset.is_rendered_alone:
        return [picture for unit in units for picture in render(job, [unit])]
    finished: dict[ChannelVariant, Visualization] = {}
    pending = list(units)
    for attempt in range(job.preset.attempts):
        drawn = start if start is not None and attempt == 0 else draw_start(job, pending, attempt)
        pictures = _attempt(job, drawn, attempt, rate=0.5**attempt)
        is_last = attempt == job.preset.attempts - 1
        retries = set() if is_last else _units_to_retry(job.preset, pictures)
        finished.update({picture.unit: picture for picture in pictures if picture.unit not in retries})
        pending = [unit for unit in pending if unit in retries]
        if not pending:
            break
    return [finished[unit] for unit in units]


def restart(job: RenderJob, units: Sequence[ChannelVariant], start: BatchStart | None = None) -> list[Visualization]:
    """Render units that stayed silent in all attempts of `render` once more, from `job.initial_images`.

    Args:
        job: As for `render`, with an initial image of each unit.
        units: As for `render`.
        start: `draw_start` of the units for attempt `job.preset.attempts`, if it is known already.

    Returns:
        One visualization for each unit, in the order of `units`, with the status "restarted", or "failed" if its
        objective did not rise above that of the initial image.
    """
    if len(units) > 1 and job.preset.is_rendered_alone:
        return [picture for unit in units for picture in restart(job, [unit])]
    attempts = job.preset.attempts
    restarted = []
    for picture in _attempt(job, start or draw_start(job, units, attempts), attempts, rate=1.0):
        if picture.status == "failed":
            reason = f"{SILENT}; from its best dataset example: {picture.reason}"
            restarted.append(dataclasses.replace(picture, reason=reason))
        else:
            reason = f"started from its best dataset example after {attempts} silent attempts"
            reason = "; ".join(filter(None, [reason, picture.reason]))
            restarted.append(dataclasses.replace(picture, status=RESTARTED, reason=reason))
    return restarted


def _units_to_retry(preset: Preset, pictures: Sequence[Visualization]) -> set[ChannelVariant]:
    """Return the units that failed; with batch terms, all units of the channels that failed."""
    failed = [picture for picture in pictures if picture.status == "failed"]
    if not preset.couplings:
        return {picture.unit for picture in failed}
    channels = {picture.channel for picture in failed}
    return {picture.unit for picture in pictures if picture.channel in channels}


def _attempt(job: RenderJob, start: BatchStart, attempt: int, rate: float) -> list[Visualization]:
    """Optimize and evaluate one image for each unit of `start`; `rate` is a factor of the learning rate."""
    start_time = time.perf_counter()
    batch = Batch(job, start)
    with steps_in(job.precision):
        _optimize(job, batch, rate)
    evaluation = evaluate(job, batch)
    seconds = (time.perf_counter() - start_time) / len(batch.units)
    return to_pictures(job, batch, evaluation, attempt, seconds)


def _optimize(job: RenderJob, batch: Batch, rate: float) -> None:
    """Optimize the images of a batch until all are finished."""
    preset, last_stage = job.preset, job.schedule[-1].stage
    with _Optimization(job, batch, rate) as optimization:
        for step, settings in enumerate(job.schedule):
            job.on_step()
            optimization.advance(step)
            if settings.stage == last_stage and _retire_finished(preset, batch, step + 1):
                optimization.forget_captured()
                if len(batch.active) == 0:
                    break
        batch.retire(torch.ones_like(batch.active, dtype=torch.bool), preset.steps)


class _Optimization(contextlib.ExitStack):
    """The optimization of a batch, step by step; a context that restores the network at its end.

    Args:
        job: The job.
        batch: The batch.
        rate: Factor of the learning rate.
    """

    def __init__(self, job: RenderJob, batch: Batch, rate: float) -> None:
        super().__init__()
        self._job, self._batch, self._schedule = job, batch, job.schedule
        optimizer, steps = job.preset.optimizer, job.preset.steps
        self._rates = [optimizer.rate(i, steps) * settings.lr * rate for i, settings in enumerate(self._schedule)]
        self._perturbations = _perturb(job, batch.units, self)
        self._stage_stack = self.enter_context(contextlib.ExitStack())
        self._stage: int | None = None
        self._began = 0
        self._forwards: list[ObjectiveForward] = []
        self._captured: CapturedSteps | None = None
        self._may_capture = True

    def advance(self, step: int) -> None:
        """Run a step; steps follow each other from 0."""
        if self._schedule[step].stage != self._stage:
            self._start_stage(step)
        if self._captured is not None:
            self._captured.advance()
        elif self._may_capture and can_be_captured(self._job, step, self._began):
            self._may_capture = False
            self._captured = captured_steps(
                self._job, self._batch, self._forwards[0], step, self._rates, lambda: self._ordinary(step)
            )
        else:
            self._ordinary(step)

    def forget_captured(self) -> None:
        """Run the steps of this stage one by one from here on, as the number of images has changed."""
        self._captured, self._may_capture = None, False

    def _start_stage(self, step: int) -> None:
        job, batch, former = self._job, self._batch, self._stage
        self._stage = self._schedule[step].stage
        stage = job.preset.stages[self._stage]
        self._captured, self._may_capture, self._began = None, True, step
        self._stage_stack.close()
        self._forwards = [
            self._stage_stack.enter_context(objective_forward(job, model, stage, penalized=True))
            for model in job.step_models
        ]
        if former is not None:
            old, new = job.canvas(job.preset.stages[former]), job.canvas(stage)
            if old != new:
                batch.resize(old, new, job.preset.margin)
        batch.start_stage(job, stage)

    def _ordinary(self, step: int) -> None:
        """Run a step without capture."""
        job, batch, settings = self._job, self._batch, self._schedule[step]
        for perturbation in self._perturbations:
            perturbation.set_step(step, step / len(self._schedule))
        forward = self._forwards[_ensemble_member(job.preset, step)]
        values, gradient = parameter_gradient(
            job, batch, forward, batch.draws(step), settings, redirects=step < REDIRECTED_STEPS
        )
        batch.record(step, values)
        batch.step(gradient, self._rates[step])
        constrain(job, batch, settings)


def _perturb(job: RenderJob, units: Sequence[ChannelVariant], stack: contextlib.ExitStack) -> list[ActivePerturbation]:
    """Apply the network perturbations of the preset until `stack` is closed."""
    active = []
    for i, perturbation in enumerate(job.preset.augmentations):
        identity = [job.seed, job.model.name, i, registered_name(perturbation)]
        if perturbation.per_image:
            identity += [job.layer.name, *units[0]]
        seed = seed_of(*identity)
        active.append(stack.enter_context(perturbation.applied(job.model.module, seed)))
    return active


def _ensemble_member(preset: Preset, step: int) -> int:
    """Return the index in `RenderJob.step_models` of the network that a step is computed with."""
    for perturbation in preset.augmentations:
        if isinstance(perturbation, Ensemble):
            return perturbation.member(step)
    return 0


def _retire_finished(preset: Preset, batch: Batch, steps: int) -> bool:
    """Remove the images from the batch that the stopping rule finds finished after `steps` steps; whether there are."""
    if steps % preset.stop.every(preset.steps) != 0 or steps == preset.steps:
        return False
    finished = preset.stop.finished(batch.trace[:steps, batch.active])
    if preset.couplings:
        # A batch term compares all variants of a channel: they stop together.
        finished = finished.view(-1, preset.variants).all(1).repeat_interleave(preset.variants)
    if not bool(finished.any()):
        return False
    batch.retire(finished, steps)
    return True
