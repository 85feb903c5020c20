"""The job that visualizations of a layer are rendered for, and what the images of a batch start from."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.registry import registered_name
from pipeline.core.seeds import seed_of
from pipeline.images.parameterizations import FromImage
from pipeline.images.transforms import ROBUSTNESS_TRANSFORMS, draw_random
from pipeline.kernels.transfers import pinned
from pipeline.layers.finding import Layer
from pipeline.models.loading import Model
from pipeline.visualization.network_penalties import Normalization
from pipeline.visualization.preset import ChannelVariant, Preset, Size, canvas_size
from pipeline.visualization.schedules import Stage, StepSettings, expand_schedule

# Number of transformed copies of a finished image that its robust activation is averaged over.
ROBUST_COPIES = 16


def _do_nothing() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class RenderJob:
    """Everything that the visualizations of one layer depend on, except the units.

    Attributes:
        model: The network.
        layer: The layer whose units are visualized.
        preset: Objective, parameterization, transformations, regularizers, optimizer and schedule.
        seed: Seed of the run.
        size: (height, width) of the finished images in pixels; None for the one that `canvas_size` chooses.
        on_step: Called before every optimization step; may raise to abort.
        step_model: A faster variant of `model` that optimization steps are computed with; None for `model`.
        exact_model: A faster variant of `model`, equal up to rounding in float32, that finished images are evaluated
            with; None for `model`.
        layers: The layers named by `preset.others`, by name.
        ensemble: The networks of an ensemble other than `model`.
        initial_images: (C, H, W) in [0, 1] by unit, with margins, of units that start from an image.
        target_image: For objectives that compare with an image: (C, H, W) in [0, 1], with margins.
        layer_mean: For objectives that compare with the mean of the layer: (C,) means of its channels over the dataset.
        normalizations: The normalizations that `preset.network_penalties` compare, in their order; see
            `network_penalties.normalizations_before`.
        depths: Fixed depths of the network; the path of finished images is measured at those before `layer`.
        capture: Captures a function that works on the device and returns one that repeats it, such as
            `cuda_graphs.capture_graph`; None to launch every step.
        precision: Precision of the steps, one of `acceleration.precision.PRECISIONS`.
    """

    model: Model
    layer: Layer
    preset: Preset
    seed: int
    size: Size | None = None
    on_step: Callable[[], None] = _do_nothing
    step_model: Model | None = None
    exact_model: Model | None = None
    layers: Mapping[str, Layer] = dataclasses.field(default_factory=dict)
    ensemble: Sequence[Model] = ()
    initial_images: Mapping[ChannelVariant, Tensor] = dataclasses.field(default_factory=dict)
    target_image: Tensor | None = None
    layer_mean: Tensor | None = None
    normalizations: Sequence[Normalization] = ()
    depths: Sequence[Layer] = ()
    capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None
    precision: str = "float32"

    @property
    def image_size(self) -> Size:
        """(height, width) of the finished images in pixels."""
        return self.size or canvas_size(self.layer, self.model.preprocessing.size, self.preset.size)

    @property
    def step_models(self) -> tuple[Model, ...]:
        """The networks that optimization steps are computed with: the network itself, then the rest of the ensemble."""
        return (self._variant(self.step_model), *self.ensemble)

    @property
    def evaluation_model(self) -> Model:
        """The network that finished images are evaluated with."""
        return self._variant(self.exact_model)

    @functools.cached_property
    def schedule(self) -> list[StepSettings]:
        """The settings of every step."""
        return expand_schedule(self.preset.schedule, self.preset.steps)

    def stage(self, settings: StepSettings) -> Stage:
        """Return the stage that a step belongs to."""
        return self.preset.stages[settings.stage]

    def canvas(self, stage: Stage) -> Size:
        """Return the size of the canvas in a stage, margins included."""
        height, width = self.canvas_without_margin(stage)
        return height + 2 * self.preset.margin, width + 2 * self.preset.margin

    def canvas_without_margin(self, stage: Stage) -> Size:
        """Return the size of the canvas in a stage, margins excluded."""
        return self._scaled(stage.canvas)

    def view(self, stage: Stage) -> Size:
        """Return the size of the network's input in a stage."""
        return self._scaled(stage.canvas if stage.view is None else stage.view)

    def _scaled(self, factor: float) -> Size:
        height, width = self.image_size
        return round(height * factor), round(width * factor)

    def _variant(self, variant: Model | None) -> Model:
        return self.model if variant is None or self.preset.requires_original_weights else variant


@dataclasses.dataclass(frozen=True)
class BatchStart:
    """What the images of a batch start from, on the CPU: it can be drawn while another batch is optimized.

    Attributes:
        units: The B pairs of (channel, variant).
        seeds: Seed of each image.
        initial: (B, …) parameters before the first step.
        transform_random: (steps, B, R) random numbers of the transformations.
        robustness_random: (copies, B, R) random numbers of the transformations that measure robustness.
    """

    units: Sequence[ChannelVariant]
    seeds: Sequence[int]
    initial: Tensor
    transform_random: Tensor
    robustness_random: Tensor

    def pinned(self) -> "BatchStart":
        """Return a copy in page-locked memory, from which a GPU copies without waiting for the host."""
        names = ("initial", "transform_random", "robustness_random")
        return dataclasses.replace(self, **{name: pinned(getattr(self, name)) for name in names})


def draw_start(job: RenderJob, units: Sequence[ChannelVariant], attempt: int) -> BatchStart:
    """Draw the initial parameters and random numbers of some units; those of each depend on its seed alone.

    Args:
        job: The network, the layer, the preset and the seed of the run.
        units: Pairs of (channel, variant).
        attempt: Number of the attempt, from 0; it enters the seeds.
    """
    preset = job.preset
    seeds, initial, transform_random, robustness_random = [], [], [], []
    for unit in units:
        seed = _seed(job, unit, attempt)
        # The generator is on the CPU for every device, so that all machines draw the same numbers.
        generator = torch.Generator().manual_seed(seed)
        initial.append(_initial_parameters(job, unit, generator))
        transform_random.append(draw_random(preset.transforms, generator, preset.steps))
        robustness_random.append(draw_random(ROBUSTNESS_TRANSFORMS, generator, ROBUST_COPIES))
        seeds.append(seed)
    return BatchStart(
        units=units,
        seeds=seeds,
        initial=torch.stack(initial),
        transform_random=torch.stack(transform_random, dim=1),
        robustness_random=torch.stack(robustness_random, dim=1),
    )


def _seed(job: RenderJob, unit: ChannelVariant, attempt: int) -> int:
    """Return the seed of an image, which depends on what it shows and not on its batch."""
    channel, variant = unit
    objective = job.preset.objective
    seed_variant = 0 if objective.aligned else variant
    return seed_of(job.seed, job.model.name, job.layer.name, channel, registered_name(objective), seed_variant, attempt)


def _initial_parameters(job: RenderJob, unit: ChannelVariant, generator: torch.Generator) -> Tensor:
    """Return the initial parameters of one image: noise, or those of its initial image if it has one.

    The parameterization `image` adds noise to the image, by its setting `sd`.
    """
    canvas, size = job.preset.canvas, job.canvas(job.preset.stages[0])
    parameters = canvas.initial(generator, job.model.preprocessing.channels, size)
    image = job.initial_images.get(unit)
    if image is None:
        assert not isinstance(canvas, FromImage), f"{unit} has no initial image"
        return parameters
    resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)
    return canvas.inverse(resized)[0] + (parameters if isinstance(canvas, FromImage) else 0)
