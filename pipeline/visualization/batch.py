"""The batch of images that is optimized together."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.images.transforms import resampling_matrices
from pipeline.images.transparency import resized_sums
from pipeline.kernels.transfers import upload
from pipeline.visualization.optimizers import TabulatedOptimizer
from pipeline.visualization.preset import Size
from pipeline.visualization.render_job import BatchStart, RenderJob
from pipeline.visualization.schedules import Stage


@dataclasses.dataclass(frozen=True)
class ComparedImages:
    """Images that activations are compared with; they get the transformations of the images of the batch.

    Attributes:
        seeds: (B, C, H, W) initial images, for regularizers in the space of a layer; None without such.
        targets: (B, C, H, W) photograph of the objective; None without one.
    """

    seeds: Tensor | None = None
    targets: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "ComparedImages":
        """Return the images after `function`."""
        return ComparedImages(*(None if x is None else function(x) for x in (self.seeds, self.targets)))


NOTHING_COMPARED = ComparedImages()

# A step, counted from 0: a number, or an int64 tensor of shape (1,) on the device of the batch.
StepIndex = int | Tensor


@dataclasses.dataclass(frozen=True)
class StepDraws:
    """The random transformations of one step.

    Attributes:
        random: (A, R) uniform random numbers.
        matrices: (A, 3, 3) for each resampling; see `resampling_matrices`.
    """

    random: Tensor
    matrices: Sequence[Tensor]

    def of(self, rows: slice | Tensor) -> "StepDraws":
        """Return those of some of the images."""
        return StepDraws(self.random[rows], [matrix[rows] for matrix in self.matrices])


class Batch:
    """The images of one attempt and the state of their optimization.

    The images share only the forward and the backward pass of the network: each has its own initial parameters,
    random transformations and optimizer state. Finished images leave the batch (`retire`); B is the number of all
    images of the attempt and A that of those that are still optimized.

    Attributes:
        units: The B pairs of (channel, variant).
        seeds: Seed of each of the B images.
        initial: (B, …) parameters before the first step.
        reference: (B, C, H, W) images before the first step; None if no regularizer compares with them.
        target: (C, H, W) photograph of the objective; None without one.
        robustness_random: (copies, B, R) random numbers of the transformations that measure robustness.
        all_channels: (B,) int64 channel of each image.
        all_variants: (B,) int64 variant of each image.
        trace: (steps, B) value of the objective at every step; 0 after an image is finished.
        steps: (B,) number of steps of each image, on the CPU.
        steps_of_state: Number of steps since the state of the optimizer was made.
        active: (A,) int64 indices of the images that are still optimized. The following attributes are of these only.
        parameters: (A, …) parameters; a leaf that requires a gradient.
        channels: (A,) int64.
        variants: (A,) int64.
        multipliers: (P, A) state of `ImageRegularizer.controlled`; the weight for those without a budget.
        is_balanced: Whether all of `balance` is known.
        balance: (D, A) factors of the regularizers in the space of a layer (`layer_regularizers.balance`); 0 before
            the first step at which both gradients are known.
        gradient_sums: (A, h, w) sum over the steps of the mean absolute gradient of the objective over the colors of
            each pixel, at the size of the canvas without its margin.
    """

    def __init__(self, job: RenderJob, start: BatchStart) -> None:
        preset = job.preset
        self.units, self.seeds = list(start.units), list(start.seeds)
        self._optimizer, self._canvas = preset.optimizer, preset.canvas
        device = job.model.device
        self.initial = start.initial.to(device, non_blocking=True)
        self.reference = None
        if preset.layer_penalties or any(regularizer.anchored for regularizer in preset.penalties):
            self.reference = self._canvas.image(self.initial, job.canvas(preset.stages[0]))
        self._compares_seeds = bool(preset.layer_penalties)
        self.target = None if job.target_image is None else job.target_image.to(device)
        self.robustness_random = start.robustness_random.to(device, non_blocking=True)
        self._random = start.transform_random  # on the CPU
        self._random_table = self._random.to(device, non_blocking=True)
        self._matrix_tables: list[Tensor] = []
        self.all_channels = torch.tensor([channel for channel, _ in self.units], device=device)
        self.all_variants = torch.tensor([variant for _, variant in self.units], device=device)
        self.trace = torch.zeros(preset.steps, len(self.units), device=device)
        self.steps = torch.full((len(self.units),), preset.steps)
        self._final: Tensor | None = None
        self._final_sums: Tensor | None = None
        self.active = torch.arange(len(self.units), device=device)
        self.parameters = self.initial.clone().requires_grad_(True)
        self.channels, self.variants = self.all_channels, self.all_variants
        weights = torch.tensor([regularizer.weight for regularizer in preset.penalties], device=device)
        self.multipliers = weights[:, None].repeat(1, len(self.units))
        self.balance = self.initial.new_zeros(len(preset.layer_penalties), len(self.units))
        self.is_balanced = False
        self.gradient_sums = self.initial.new_zeros(len(self.units), *job.canvas_without_margin(preset.stages[0]))
        self._start_optimizer()

    @property
    def final(self) -> Tensor:
        """(B, …) parameters of the finished images; defined once one is finished."""
        assert self._final is not None, "no image of the batch is finished"
        return self._final

    @property
    def final_gradient_sums(self) -> Tensor:
        """(B, H, W) `gradient_sums` of the finished images; defined once one is finished."""
        assert self._final_sums is not None, "no image of the batch is finished"
        return self._final_sums

    def reference_of(self, images: Tensor) -> Tensor:
        """Return the initial images of the active images at the size of `images`; `images` itself if not needed."""
        if self.reference is None:
            return images
        return _resized(self.reference[self.active], (images.shape[-2], images.shape[-1]))

    def compared(self, size: Size, rows: slice | Tensor) -> ComparedImages:
        """Return what `rows` of the active images are compared with, on a canvas of (height, width) `size`."""
        indices = self.active[rows]
        seeds = targets = None
        if self._compares_seeds and self.reference is not None:
            seeds = _resized(self.reference[indices], size)
        if self.target is not None:
            targets = _resized(self.target[None], size).expand(len(indices), -1, -1, -1)
        return ComparedImages(seeds, targets)

    def start_stage(self, job: RenderJob, stage: Stage) -> None:
        """Compute the matrices of all steps for the canvas and the view of a stage.

        They are computed on the CPU for every device, so that no device rounds a crop to another pixel, and together:
        one step's are some forty operations on a few numbers.
        """
        steps, images, count = self._random.shape
        flat = self._random.view(steps * images, count)
        matrices = resampling_matrices(job.preset.transforms, flat, job.canvas(stage), job.view(stage))
        self._matrix_tables = [
            upload(matrix.view(steps, images, 3, 3), self.active.device)[:, self.active] for matrix in matrices
        ]

    def draws(self, step: StepIndex) -> StepDraws:
        """Return the random transformations of a step of the stage that `start_stage` was called for."""
        return StepDraws(_row(self._random_table, step), [_row(table, step) for table in self._matrix_tables])

    def record(self, step: StepIndex, values: Tensor) -> None:
        """Store the (A,) values of the objective at a step in `trace`."""
        if isinstance(step, Tensor):
            self.trace.index_put_((step, self.active), values)
        else:
            self.trace[step, self.active] = values

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """Move the parameters of the active images up the gradient, (A, …)."""
        self._optimizer.step(self.parameters, gradient, self._state, self.steps_of_state, learning_rate)
        self.steps_of_state += 1

    def apply(self, gradient: Tensor, numbers: Tensor) -> None:
        """Make the step of a `TabulatedOptimizer` with its numbers; `steps_of_state` is left to the caller."""
        assert isinstance(self._optimizer, TabulatedOptimizer)
        self._optimizer.apply(self.parameters, gradient, self._state, numbers)

    def prepare_apply(self) -> None:
        """Prepare `apply` for being captured."""
        assert isinstance(self._optimizer, TabulatedOptimizer)
        self._optimizer.prepare(self.parameters.detach(), self._state)

    @property
    def changing(self) -> tuple[Tensor, ...]:
        """The tensors that a step changes in place, except `trace`."""
        return (self.parameters, *self._state, self.multipliers, self.gradient_sums)

    def resize(self, old: Size, new: Size, margin: int) -> None:
        """Continue on a canvas of another size, with a new optimizer state; both sizes include the margin."""
        resized = self._canvas.resized(self.parameters.detach(), old, new)
        self.gradient_sums = resized_sums(self.gradient_sums, (new[0] - 2 * margin, new[1] - 2 * margin))
        self.parameters = resized.requires_grad_(True)
        self._start_optimizer()

    def retire(self, finished: Tensor, steps: int) -> None:
        """Store the final parameters of finished images and continue with the others.

        Args:
            finished: (A,) bool.
            steps: Number of steps that the finished images were optimized for.
        """
        parameters, indices, others = self.parameters.detach(), self.active[finished], ~finished
        if self._final is None:
            self._final = parameters.new_zeros(len(self.units), *parameters.shape[1:])
        if self._final_sums is None:
            self._final_sums = self.gradient_sums.new_zeros(len(self.units), *self.gradient_sums.shape[1:])
        self._final[indices] = parameters[finished]
        self._final_sums[indices] = self.gradient_sums[finished]
        self.steps[indices.cpu()] = steps
        self.active, self.channels, self.variants = self.active[others], self.channels[others], self.variants[others]
        self.parameters = parameters[others].requires_grad_(True)
        self._random_table = self._random_table[:, others]
        self._matrix_tables = [table[:, others] for table in self._matrix_tables]
        self.multipliers = self.multipliers[:, others]
        self.balance = self.balance[:, others]
        self.gradient_sums = self.gradient_sums[others]
        self._state = tuple(part[others] for part in self._state)

    def _start_optimizer(self) -> None:
        self._state = self._optimizer.init_state(self.parameters, self._canvas.paired)
        self.steps_of_state = 0


def _row(table: Tensor, step: StepIndex) -> Tensor:
    """Return the row of a table, (steps, …), of a step."""
    return table.index_select(0, step)[0] if isinstance(step, Tensor) else table[step]


def _resized(images: Tensor, size: Size) -> Tensor:
    """Return (B, C, H, W) images at (height, width) `size`."""
    if (images.shape[-2], images.shape[-1]) == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)
