"""Evaluation of finished images: clean activation, robust activation, image metrics and status."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.acceleration.precision import ieee
from pipeline.core.metric_specs import IMAGE_METRICS
from pipeline.core.registry import registered_name
from pipeline.data.natural_spectrum import packaged_spectrum
from pipeline.images import metrics
from pipeline.images.image_regularizers import BUDGET_TOLERANCE
from pipeline.images.transforms import ROBUSTNESS_TRANSFORMS, apply_transforms, center_crop
from pipeline.images.transparency import resized_sums, to_mask
from pipeline.layers.finding import Layer
from pipeline.layers.path_depths import depths_before, spatial_means
from pipeline.visualization.batch import NOTHING_COMPARED, Batch, ComparedImages
from pipeline.visualization.forward import objective_forward
from pipeline.visualization.preset import ChannelVariant, Preset
from pipeline.visualization.render_job import RenderJob
from pipeline.visualization.schedules import Stage, is_flat

# Number of values of the objective that are stored with an image.
TRACE_POINTS = 16

# Why an image failed whose objective had no gradient at any step.
SILENT = "no gradient: the unit stayed silent at every step"
# Status of an image whose objective rose only from the best dataset example of its unit. If it did not rise from there
# either, the status is "failed", and the reason begins with `SILENT`.
RESTARTED = "restarted"


@dataclasses.dataclass(frozen=True)
class Visualization:
    """A finished feature visualization and its evaluation.

    Attributes:
        channel: Channel of the unit.
        variant: Number of the variant.
        image: (H, W, C) uint8.
        mask: (H, W) uint8 transparency mask: absolute gradient of the objective, summed over the steps; see
            `pipeline.images.transparency.to_mask`.
        activation: Value of the objective for exactly this image, without transformations.
        robust: Mean value of the objective over 16 copies under `ROBUSTNESS_TRANSFORMS`, the same for every preset.
        start: Value of the objective before the first step.
        seed: Seed of the image.
        status: "converged"; "limit" (all steps done and still rising); "retried" (rose with another seed); "restarted"
            (rose from the unit's best dataset example); or "failed".
        reason: Why the image failed or was restarted, or which budget of a regularizer it does not meet; else empty.
        steps: Number of optimization steps.
        seconds: Processing time of the batch divided by its number of images.
        trace: (16,) values of the objective at evenly spaced steps; fewer if there are fewer steps.
        response: (C,) float16 maximum of each channel of the layer over the positions.
        path_means: (N,) float16 spatial mean of each channel of the depths before the layer (`depths_before`), one
            depth after the other, and then of the layer itself; NaN for a depth that was not computed.
        measures: The metrics `IMAGE_METRICS` by name.
        budget_values: (P,) float32 mean of each of `Preset.budgets` for exactly this image.
    """

    channel: int
    variant: int
    image: np.ndarray
    mask: np.ndarray
    activation: float
    robust: float
    start: float
    seed: int
    status: str
    reason: str
    steps: int
    seconds: float
    trace: np.ndarray
    response: np.ndarray
    path_means: np.ndarray
    measures: Mapping[str, float]
    budget_values: np.ndarray

    @property
    def unit(self) -> ChannelVariant:
        """(channel, variant)."""
        return self.channel, self.variant


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation of the B finished images of a batch.

    Attributes:
        images: (B, H, W, C) uint8.
        masks: (B, H, W) uint8 transparency masks.
        activation: Value of the objective for each image.
        robust: Mean value of the objective over the transformed copies of each image.
        start: Value of the objective for each image before the first step.
        responses: (B, C) float16 maximum of each channel of the layer.
        path_means: (B, N) float16 spatial means; see `Visualization.path_means`.
        measures: Values of each of `IMAGE_METRICS`, by name.
        budget_values: (B, P) float32 mean of each of `Preset.budgets` for each image.
    """

    images: np.ndarray
    masks: np.ndarray
    activation: list[float]
    robust: list[float]
    start: list[float]
    responses: np.ndarray
    path_means: np.ndarray
    measures: Mapping[str, list[float]]
    budget_values: np.ndarray


@torch.no_grad()
@ieee()
def evaluate(job: RenderJob, batch: Batch) -> Evaluation:
    """Measure the finished images of `batch` as they will be saved, with 8 bits, by `job.evaluation_model`."""
    preset = job.preset
    first, last = preset.stages[0], job.stage(job.schedule[-1])
    size, depths = job.image_size, depths_before(job.layer, job.depths)
    with (
        objective_forward(job, job.evaluation_model, Stage()) as forward,
        objective_forward(job, job.evaluation_model, Stage(), depths=depths) as measuring_forward,
    ):
        start_images = preset.canvas.image(batch.initial, job.canvas(first))
        start_images = center_crop(start_images, job.canvas_without_margin(first))
        if start_images.shape[-2:] != size:
            start_images = F.interpolate(start_images, size, mode="bilinear", antialias=True)
        compared = _compared(job, batch, size)
        start = forward(quantized(start_images), batch.all_channels, batch.all_variants, compared).values
        images = quantized(center_crop(preset.canvas.image(batch.final, job.canvas(last)), size))
        clean = measuring_forward(images, batch.all_channels, batch.all_variants, compared)
        means = {**clean.means, job.layer.name: spatial_means(clean.activations)}
        path_means = _path_means(depths, means, job.layer)
        robust_values = []
        for random in batch.robustness_random:
            transform = functools.partial(apply_transforms, transforms=ROBUSTNESS_TRANSFORMS, random=random, size=size)
            copies = transform(images), batch.all_channels, batch.all_variants, compared.map(transform)
            robust_values.append(forward(*copies).values)
        robust = torch.stack(robust_values).mean(0)
        sums = batch.final_gradient_sums
        if sums.shape[-2:] != size:
            sums = resized_sums(sums, size)
    sign = -1 if preset.negative else 1
    # One copy from the device for all of them.
    activation, robust, start = (sign * torch.stack([clean.values, robust, start])).tolist()
    return Evaluation(
        images=(images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy(),
        masks=to_mask(sums.cpu()).numpy(),
        activation=activation,
        robust=robust,
        start=start,
        responses=metrics.to_float16(clean.activations.flatten(2).amax(2)),
        path_means=metrics.to_float16(path_means),
        measures=_measures(job, images, clean.activations, batch.all_channels),
        budget_values=_budget_values(preset, batch, images),
    )


def _compared(job: RenderJob, batch: Batch, size: tuple[int, int]) -> ComparedImages:
    """Return the photograph that the objective compares all images of a batch with, without margins."""
    if batch.target is None:
        return NOTHING_COMPARED
    return ComparedImages(targets=target_view(batch.target, size).expand(len(batch.units), -1, -1, -1))


def target_view(target: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the part of a photograph (C, H, W) with margins that finished images show, (1, C, *size), 8 bits."""
    return quantized(center_crop(target[None], size))


def to_pictures(
    job: RenderJob, batch: Batch, evaluation: Evaluation, attempt: int, seconds: float
) -> list[Visualization]:
    """Return the finished visualizations of a batch, each with its status."""
    preset = job.preset
    sign = -1 if preset.negative else 1
    traces = batch.trace.cpu()
    pictures = []
    for i, (channel, variant) in enumerate(batch.units):
        steps = int(batch.steps[i])
        trace = traces[:steps, i]
        start, activation = evaluation.start[i], evaluation.activation[i]
        status, reason = _status(trace, sign * start, sign * activation, steps < preset.steps, attempt)
        if status != "failed":
            reason = unmet_budgets(preset, evaluation.budget_values[i])
        points = np.linspace(0, steps - 1, min(preset.steps, TRACE_POINTS)).round().astype(int)
        pictures.append(
            Visualization(
                channel=channel,
                variant=variant,
                image=evaluation.images[i],
                mask=evaluation.masks[i],
                activation=activation,
                robust=evaluation.robust[i],
                start=start,
                seed=batch.seeds[i],
                status=status,
                reason=reason,
                steps=steps,
                seconds=seconds,
                trace=sign * trace[torch.from_numpy(points)].numpy(),
                response=evaluation.responses[i],
                path_means=evaluation.path_means[i],
                measures={name: values[i] for name, values in evaluation.measures.items()},
                budget_values=evaluation.budget_values[i],
            )
        )
    return pictures


def quantized(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 8 bits, as saving does; NaN becomes 0."""
    return (images.nan_to_num(0.0).clamp(0, 1) * 255).round() / 255


def _path_means(depths: Sequence[Layer], means: Mapping[str, Tensor], layer: Layer) -> Tensor:
    """Join the (B, C) means at `depths` and at `layer` to (B, N); NaN for a depth that is missing or of another size.

    The channels of some layers depend on the size of the image, such as those of a flattened map.
    """
    own = means[layer.name]
    parts = []
    for depth in depths:
        unknown = own.new_full((len(own), depth.channels), torch.nan)
        found = means.get(depth.name, unknown)
        parts.append(found if found.shape == unknown.shape else unknown)
    return torch.cat([*parts, own], 1)


def _measures(job: RenderJob, images: Tensor, activations: Tensor, channels: Tensor) -> dict[str, list[float]]:
    """Return each of `IMAGE_METRICS` for (B, C, H, W) images and the layer's maps of them."""
    layer, own = job.layer, metrics.own_activations(activations.flatten(2).float(), channels, job.preset.negative)
    # The image belongs to the layer, not to a channel; or peak and mean are not what the objective raises.
    if job.preset.objective.per_layer or not job.preset.objective.raises_activation:
        own = {name: torch.full_like(values, torch.nan) for name, values in own.items()}
    if layer.field:
        stride = max(layer.field.stride)
    else:
        height, width = job.model.preprocessing.size
        stride = round(min(height / layer.height, width / layer.width))
    measures = metrics.image_metrics(images, metrics.strides(stride), packaged_spectrum()) | own
    names = [metric.name for metric in IMAGE_METRICS]
    return dict(zip(names, torch.stack([measures[name].double() for name in names]).tolist(), strict=True))


def _budget_values(preset: Preset, batch: Batch, images: Tensor) -> np.ndarray:
    """Return the mean of each regularizer with a budget for (B, C, H, W) finished images, (B, P) float32."""
    size = (images.shape[-2], images.shape[-1])
    reference = images
    if batch.reference is not None:
        reference = center_crop(batch.reference, (size[0] + 2 * preset.margin, size[1] + 2 * preset.margin))
        reference = center_crop(reference, size)
    values = [regularizer.mean(images, reference) for regularizer in preset.budgets]
    return torch.stack(values, dim=1).cpu().numpy() if values else np.zeros((len(images), 0), np.float32)


def unmet_budgets(preset: Preset, budget_values: np.ndarray) -> str:
    """Return which budgets an image does not meet, and the values reached; empty if it meets all.

    Args:
        preset: The preset.
        budget_values: (P,) mean of each of `Preset.budgets`.
    """
    unmet = []
    for regularizer, value in zip(preset.budgets, budget_values.tolist(), strict=True):
        target = regularizer.target
        assert target is not None
        # Below its budget an image is as natural as required without the regularizer.
        if not value / target - 1 <= BUDGET_TOLERANCE:
            unmet.append(f"{registered_name(regularizer)} of {value:.3g} is above its budget of {target:.3g}")
    return "; ".join(unmet)


def _status(trace: Tensor, before: float, after: float, stopped_early: bool, attempt: int) -> tuple[str, str]:
    """Return (status, reason) of an image.

    Args:
        trace: (steps,) maximized value at every step.
        before: Maximized value before the first step.
        after: Maximized value of the finished image.
        stopped_early: Whether the image was finished before its last step.
        attempt: Number of the attempt, from 0.
    """
    invalid = (~torch.isfinite(trace)).nonzero()
    if len(invalid):
        return "failed", f"the objective was not a finite number at step {int(invalid[0])}"
    if not after > before:
        if bool((trace == trace[0]).all()):
            return "failed", SILENT
        return "failed", "the objective did not rise over the start"
    if attempt > 0:
        return "retried", ""
    width = max(1, len(trace) // 10)
    converged = stopped_early or bool(is_flat(trace[:, None], width, 0.02))
    return ("converged" if converged else "limit"), ""
