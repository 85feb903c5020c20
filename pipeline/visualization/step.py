"""One optimization step: the gradient of all terms with respect to the parameters, and their valid range."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.acceleration.redirected_relu import has_zero_gradient, redirected
from pipeline.data.image_filters import rms
from pipeline.images.transforms import apply_transforms, center_crop
from pipeline.images.transparency import gradient_magnitude
from pipeline.kernels.transfers import constant_like
from pipeline.visualization.batch import Batch, StepDraws
from pipeline.visualization.forward import ForwardResult, ObjectiveForward
from pipeline.visualization.layer_regularizers import balance
from pipeline.visualization.preset import Preset
from pipeline.visualization.render_job import RenderJob
from pipeline.visualization.schedules import StepSettings

ALL = slice(None)


@torch.no_grad()
def constrain(job: RenderJob, batch: Batch, settings: StepSettings) -> None:
    """Project the parameters to their valid range, and blur the images if the schedule does."""
    canvas = job.preset.canvas
    canvas.project(batch.parameters)
    if settings.blur > 0:
        size = job.canvas(job.stage(settings))
        batch.parameters.copy_(canvas.blurred(batch.parameters, settings.blur, size))


def parameter_gradient(
    job: RenderJob, batch: Batch, forward: ObjectiveForward, draws: StepDraws, settings: StepSettings, redirects: bool
) -> tuple[Tensor, Tensor]:
    """Return the (A,) values of the objective and the gradient of all terms with respect to the parameters.

    Args:
        job: The job.
        batch: The batch; the state of its budgets and its sums of gradients are updated.
        forward: The forward pass of the stage.
        draws: The random transformations of the step.
        settings: The settings of the step.
        redirects: Whether images without any gradient get redirected ReLU gradients.
    """
    preset = job.preset
    canvas_images = preset.canvas.image(batch.parameters, job.canvas(job.stage(settings)))
    images = canvas_images.detach().requires_grad_(True)

    def to_parameters(image_gradient: Tensor) -> Tensor:
        return torch.autograd.grad(canvas_images, batch.parameters, image_gradient, retain_graph=True)[0]

    pass_ = _ObjectivePass(job, batch, forward, draws, settings, to_parameters)
    values, gradient = pass_.redirected_gradient(images) if redirects else pass_.gradient(images)
    # The transparency mask is about the objective: regularizers and preconditioners change the gradient below.
    batch.gradient_sums += gradient_magnitude(gradient, job.canvas_without_margin(job.stage(settings)))
    multipliers = _control_multipliers(job, batch, settings, images.detach())
    of_regularizers = regularizer_gradients(preset, batch, settings, images, multipliers)
    # Relative weights hold for an objective whose gradient has an rms of 1. Regularizers are scaled by the actual rms,
    # so that the gradient of the objective itself is not rescaled.
    scale = rms(gradient) if of_regularizers else gradient
    for relative, regularizer_gradient in of_regularizers.items():
        gradient = gradient - (scale * regularizer_gradient if relative else regularizer_gradient)
    for preconditioner in preset.preconditioners:
        gradient = preconditioner.apply(gradient, settings.gradient_blur)
    return values, to_parameters(gradient)


@dataclasses.dataclass(frozen=True)
class _ObjectivePass:
    """Forward and backward pass from images to the objective, under the transformations of a step.

    The gradient includes that of the terms on layers.

    Attributes:
        job: The job.
        batch: The batch.
        forward: The forward pass of the stage.
        draws: The random transformations of the step.
        settings: The settings of the step.
        to_parameters: Returns the gradient in the parameters for one in the images.
    """

    job: RenderJob
    batch: Batch
    forward: ObjectiveForward
    draws: StepDraws
    settings: StepSettings
    to_parameters: Callable[[Tensor], Tensor]

    def gradient(self, images: Tensor, rows: slice | Tensor = ALL) -> tuple[Tensor, Tensor]:
        """Return the values of the objective and its gradient in the images, for `rows` of the active images."""
        preset, batch = self.job.preset, self.batch
        stage = self.job.stage(self.settings)
        view, draws = self.job.view(stage), self.draws.of(rows)

        def transformed(some: Tensor) -> Tensor:
            return apply_transforms(some, preset.transforms, draws.random, view, draws.matrices)

        compared = batch.compared(self.job.canvas(stage), rows).map(transformed)
        result = self.forward(transformed(images), batch.channels[rows], batch.variants[rows], compared)
        total = result.values.sum()
        if result.terms is not None:
            total = total + result.terms.sum()
        if result.distances is not None:
            if isinstance(rows, slice):  # all images, without redirected gradients
                _fix_balance(preset, batch, result, images, self.to_parameters)
            weights = constant_like(batch.balance, tuple(term.weight for term in preset.layer_penalties))
            total = total - (weights[:, None] * batch.balance[:, rows] * result.distances).sum()
        return result.values.detach(), torch.autograd.grad(total, images)[0]

    def redirected_gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return `gradient`; images for which it is zero get a second pass with redirected ReLU gradients."""
        values, gradient = self.gradient(images)
        dead = has_zero_gradient(gradient).flatten()
        if not bool(dead.any()):
            return values, gradient
        if dead.device.type != "cpu":
            # A pass over the dead images alone would need their number, for which a GPU has to be waited for.
            with redirected(self.forward.model.module):
                _, instead = self.gradient(images.detach().requires_grad_(True))
            return values, torch.where(dead[:, None, None, None], instead, gradient)
        # Batch terms compare all variants of a channel: the second pass needs all of them.
        groups = dead.view(-1, self.job.preset.variants if self.job.preset.couplings else 1)
        rows = groups.any(1).repeat_interleave(groups.shape[1])
        with redirected(self.forward.model.module):
            _, instead = self.gradient(images.detach()[rows].requires_grad_(True), rows)
        return values, gradient.index_put((dead,), instead[dead[rows]])


def _fix_balance(
    preset: Preset,
    batch: Batch,
    result: ForwardResult,
    images: Tensor,
    parameter_gradient: Callable[[Tensor], Tensor],
) -> None:
    """Set `batch.balance` where it is not known yet, for terms and images that are past `LayerRegularizer.least`."""
    assert result.distances is not None
    if batch.is_balanced:
        return
    least = constant_like(result.distances, tuple(term.least for term in preset.layer_penalties))
    unknown = batch.balance == 0
    pending = unknown & (result.distances.detach() >= least[:, None])
    if not bool(pending.any()):
        batch.is_balanced = not bool(unknown.any())
        return

    def gradient(total: Tensor) -> Tensor:
        return parameter_gradient(torch.autograd.grad(total, images, retain_graph=True)[0])

    objective = gradient(result.values.sum())
    measured = torch.stack([balance(objective, gradient(distance.sum())) for distance in result.distances])
    batch.balance = torch.where(pending, measured, batch.balance)


def regularizer_gradients(
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
        losses[regularizer.relative] = losses.get(regularizer.relative, loss.new_zeros(())) + loss
    for term in preset.couplings:
        if term.space == "image":
            groups = images.unflatten(0, (-1, preset.variants))
            value = term.value(groups).sum()
            losses[True] = losses.get(True, value.new_zeros(())) - term.weight * value
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
