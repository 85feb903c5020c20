"""The optimization loop: from a batch of units of one layer to their feature visualizations.

The loss is the *sum* of the objective over the batch. With the mean, gradients would scale with the batch size, and
Adam's epsilon would make results depend on it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS, has_zero_gradient, redirected
from pipeline.core.registry import registered_name
from pipeline.core.seeds import seed_of
from pipeline.data.image_filters import rms
from pipeline.images.transforms import apply_transforms, center_crop
from pipeline.images.transparency import gradient_magnitude
from pipeline.visualization.batch import Batch, BatchStart, RenderJob, draw_start
from pipeline.visualization.evaluation import RESTARTED, SILENT, Visualization, evaluate, to_pictures
from pipeline.visualization.forward import ForwardResult, ObjectiveForward, objective_forward
from pipeline.visualization.layer_regularizers import balance
from pipeline.visualization.network_perturbations import ActivePerturbation, Ensemble
from pipeline.visualization.preset import ChannelVariant, Preset
from pipeline.visualization.schedules import StepSettings


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
    _optimize(job, batch, rate)
    evaluation = evaluate(job, batch)
    seconds = (time.perf_counter() - start_time) / len(batch.units)
    return to_pictures(job, batch, evaluation, attempt, seconds)


def _optimize(job: RenderJob, batch: Batch, rate: float) -> None:
    """Optimize the images of a batch until all are finished."""
    preset, schedule = job.preset, job.schedule
    current: StepSettings | None = None
    with contextlib.ExitStack() as perturbation_stack, contextlib.ExitStack() as forward_stack:
        perturbations = _perturb(job, perturbation_stack)
        forwards: list[ObjectiveForward] = []
        for step, settings in enumerate(schedule):
            job.on_step()
            if current is None or settings.stage != current.stage:
                stage = job.stage(settings)
                forward_stack.close()
                forwards = [
                    forward_stack.enter_context(objective_forward(job, m, stage, penalized=True))
                    for m in job.step_models
                ]
                if current is not None and job.canvas(job.stage(current)) != job.canvas(stage):
                    batch.resize(job.canvas(job.stage(current)), job.canvas(stage), preset.margin)
            current = settings
            for perturbation in perturbations:
                perturbation.set_step(step)
            values, gradient = _gradient(job, batch, forwards[_ensemble_member(preset, step)], step, settings)
            batch.trace[step, batch.active] = values
            batch.step(gradient, preset.optimizer.rate(step, preset.steps) * settings.lr * rate)
            _constrain(job, batch, settings)
            if settings.stage == schedule[-1].stage:
                _retire_finished(preset, batch, step + 1)
                if len(batch.active) == 0:
                    break
        batch.retire(torch.ones_like(batch.active, dtype=torch.bool), preset.steps)


def _perturb(job: RenderJob, stack: contextlib.ExitStack) -> list[ActivePerturbation]:
    """Apply the network perturbations of the preset until `stack` is closed."""
    active = []
    for i, perturbation in enumerate(job.preset.augmentations):
        seed = seed_of(job.seed, job.model.name, i, registered_name(perturbation))
        active.append(stack.enter_context(perturbation.applied(job.model.module, seed)))
    return active


def _ensemble_member(preset: Preset, step: int) -> int:
    """Return the index in `RenderJob.step_models` of the network that a step is computed with."""
    for perturbation in preset.augmentations:
        if isinstance(perturbation, Ensemble):
            return perturbation.member(step)
    return 0


@torch.no_grad()
def _constrain(job: RenderJob, batch: Batch, settings: StepSettings) -> None:
    """Project the parameters to their valid range, and blur the images if the schedule does."""
    canvas = job.preset.canvas
    canvas.project(batch.parameters)
    if settings.blur > 0:
        size = job.canvas(job.stage(settings))
        batch.parameters.copy_(canvas.blurred(batch.parameters, settings.blur, size))


def _retire_finished(preset: Preset, batch: Batch, steps: int) -> None:
    """Remove the images from the batch that the stopping rule finds finished after `steps` steps."""
    if steps % preset.stop.every(preset.steps) != 0 or steps == preset.steps:
        return
    finished = preset.stop.finished(batch.trace[:steps, batch.active])
    if preset.couplings:
        # A batch term compares all variants of a channel: they stop together.
        finished = finished.view(-1, preset.variants).all(1).repeat_interleave(preset.variants)
    if bool(finished.any()):
        batch.retire(finished, steps)


def _gradient(
    job: RenderJob, batch: Batch, forward: ObjectiveForward, step: int, settings: StepSettings
) -> tuple[Tensor, Tensor]:
    """Return the (A,) values of the objective and the gradient of all terms with respect to the parameters."""
    preset = job.preset
    canvas_images = preset.canvas.image(batch.parameters, job.canvas(job.stage(settings)))
    images = canvas_images.detach().requires_grad_(True)

    def parameter_gradient(image_gradient: Tensor) -> Tensor:
        return torch.autograd.grad(canvas_images, batch.parameters, image_gradient, retain_graph=True)[0]

    values, gradient = _objective_gradient(job, batch, forward, step, settings, images, parameter_gradient)
    # The transparency mask is about the objective: regularizers and preconditioners change the gradient below.
    batch.gradient_sums += gradient_magnitude(gradient, job.canvas_without_margin(job.stage(settings)))
    multipliers = _control_multipliers(job, batch, settings, images.detach())
    regularizer_gradients = _regularizer_gradients(preset, batch, settings, images, multipliers)
    # Relative weights hold for an objective whose gradient has an rms of 1. Regularizers are scaled by the actual rms,
    # so that the gradient of the objective itself is not rescaled.
    scale = rms(gradient) if regularizer_gradients else gradient
    for relative, regularizer_gradient in regularizer_gradients.items():
        gradient = gradient - (scale * regularizer_gradient if relative else regularizer_gradient)
    for preconditioner in preset.preconditioners:
        gradient = preconditioner.apply(gradient, settings.gradient_blur)
    return values, parameter_gradient(gradient)


def _objective_gradient(
    job: RenderJob,
    batch: Batch,
    forward: ObjectiveForward,
    step: int,
    settings: StepSettings,
    images: Tensor,
    parameter_gradient: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the (A,) values of the objective under this step's transformations and its gradient in `images`.

    The gradient includes that of the terms on layers. During the first steps, images without any gradient get a second
    pass with redirected ReLU gradients. `parameter_gradient` returns the gradient in the parameters for one in the
    images.
    """
    preset = job.preset
    canvas, view = job.canvas(job.stage(settings)), job.view(job.stage(settings))

    def backward(images: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        def transformed(some: Tensor) -> Tensor:
            return apply_transforms(some, preset.transforms, batch.transform_random[step, rows], view)

        compared = batch.compared(canvas, rows).map(transformed)
        result = forward(transformed(images), batch.channels[rows], batch.variants[rows], compared)
        total = result.values.sum()
        if result.terms is not None:
            total = total + result.terms.sum()
        if result.distances is not None:
            if isinstance(rows, slice):  # all images, without redirected gradients
                _fix_balance(preset, batch, result, images, parameter_gradient)
            weights = batch.balance.new_tensor([term.weight for term in preset.layer_penalties])
            total = total - (weights[:, None] * batch.balance[:, rows] * result.distances).sum()
        return result.values.detach(), torch.autograd.grad(total, images)[0]

    values, gradient = backward(images, slice(None))
    if step >= REDIRECTED_STEPS:
        return values, gradient
    dead = has_zero_gradient(gradient).flatten()
    if not bool(dead.any()):
        return values, gradient
    # Batch terms compare all variants of a channel: the second pass needs all of them.
    groups = dead.view(-1, preset.variants if preset.couplings else 1)
    rows = groups.any(1).repeat_interleave(groups.shape[1])
    with redirected(forward.model.module):
        _, redirected_gradient = backward(images.detach()[rows].requires_grad_(True), rows)
    return values, gradient.index_put((dead,), redirected_gradient[dead[rows]])


def _fix_balance(
    preset: Preset,
    batch: Batch,
    result: ForwardResult,
    images: Tensor,
    parameter_gradient: Callable[[Tensor], Tensor],
) -> None:
    """Set `batch.balance` where it is not known yet, for terms and images that are past `LayerRegularizer.least`."""
    assert result.distances is not None
    least = result.distances.new_tensor([term.least for term in preset.layer_penalties])
    pending = (batch.balance == 0) & (result.distances.detach() >= least[:, None])
    if not bool(pending.any()):
        return

    def gradient(total: Tensor) -> Tensor:
        return parameter_gradient(torch.autograd.grad(total, images, retain_graph=True)[0])

    objective = gradient(result.values.sum())
    measured = torch.stack([balance(objective, gradient(distance.sum())) for distance in result.distances])
    batch.balance = torch.where(pending, measured, batch.balance)


def _regularizer_gradients(
    preset: Preset, batch: Batch, settings: StepSettings, images: Tensor, multipliers: Tensor
) -> dict[bool, Tensor]:
    """Return the gradients in `images` of all image regularizers and of the batch terms on images.

    Args:
        preset: The preset.
        batch: The batch.
        settings: Settings of the step.
        images: (A, C, H, W), which require a gradient.
        multipliers: (P, A) factors of the regularizers with a budget.

    Returns:
        Gradients of a loss to be minimized, (A, C, H, W): the key True holds the sum of those whose weight is relative
        to the objective's gradient, False the sum of the others. A key without any term is absent.
    """
    reference = batch.reference_of(images)
    losses: dict[bool, Tensor] = {}
    for i, regularizer in enumerate(preset.penalties):
        values = regularizer.value(images, reference)
        if regularizer.target is None:
            loss = settings.penalties * regularizer.weight * values.sum()
        else:
            loss = settings.penalties * (multipliers[i] * values).sum()
        losses[regularizer.relative] = losses.get(regularizer.relative, torch.zeros(())) + loss
    for term in preset.couplings:
        if term.space == "image":
            groups = images.unflatten(0, (-1, preset.variants))
            losses[True] = losses.get(True, torch.zeros(())) - term.weight * term.value(groups).sum()
    return {relative: torch.autograd.grad(loss, images)[0] for relative, loss in losses.items()}


@torch.no_grad()
def _control_multipliers(job: RenderJob, batch: Batch, settings: StepSettings, images: Tensor) -> Tensor:
    """Return the factors of the regularizers at this step, (P, A), and move those with a budget towards it.

    The margin, which the finished image lacks, does not count: without transformations the objective does not see it,
    so that its pixels follow the regularizers alone.
    """
    if not job.preset.budgets:
        return batch.multipliers
    size = job.canvas_without_margin(job.stage(settings))
    inner, reference = center_crop(images, size), center_crop(batch.reference_of(images), size)
    multipliers = torch.empty_like(batch.multipliers)
    for i, regularizer in enumerate(job.preset.penalties):
        means = regularizer.mean(inner, reference)
        multipliers[i], batch.multipliers[i] = regularizer.controlled(batch.multipliers[i], means)
    return multipliers
